"""The values that are given by hand are of types and fields that exist."""

from __future__ import annotations

from transformers import CONFIG_MAPPING

from moe_lab.families.sizes import SENSES, SPECIAL, TEXT, TYPE_VARIANTS
from moe_lab.families.tiny import base_of, model_types, parts_of, tiny_config


def test_special_values_are_of_parts_of_types_that_exist() -> None:
    there = {part.model_type for name in model_types() for part in parts_of(base_of(name))}
    assert set(SPECIAL) <= there, set(SPECIAL) - there


def test_every_size_has_a_field_somewhere() -> None:
    types = {base_of(name) for name in model_types()}
    fields = {field for name in types for part in parts_of(name) for field in vars(part)}
    assert not (set(TEXT) | set(SENSES)) - fields


def test_a_variant_is_another_structure() -> None:
    for name in TYPE_VARIANTS:
        assert tiny_config(name).to_dict() != tiny_config(base_of(name)).to_dict(), name
        assert model_types()[name] == model_types()[base_of(name)]


def test_one_type_in_two_is_built_without_a_special_value() -> None:
    assert len(SPECIAL) < len(model_types()) / 2
    assert "mixtral" in CONFIG_MAPPING and "mixtral" not in SPECIAL
