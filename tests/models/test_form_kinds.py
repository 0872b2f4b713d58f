"""The words for a checkpoint's form, from config files as they are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from families import tiny_model

from moe_lab.models.form_kinds import FEATURES, family_named, form_kind
from moe_lab.models.own_config import own_values

QWEN: dict[str, Any] = {
    "model_type": "qwen2_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "mlp_only_layers": [0],
}
MIXTRAL = {"model_type": "mixtral", "num_local_experts": 8, "num_hidden_layers": 4}


def own(**layers: dict[str, Any]) -> dict[str, Any]:
    """A config.json of our own form with these layers."""
    named = {name.removeprefix("layer_"): layer for name, layer in layers.items()}
    return own_values(QWEN | {"moe_lab": {"padding": 0.01, "layers": named}})


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, "native"),
        ({"num_experts": 6}, "native, fewer experts"),
        ({"num_hidden_layers": 3}, "native, fewer layers"),
        ({"num_experts_per_tok": 1, "distinct_experts": {"1": 4}},
         "native, fewer experts per token, twins"),
        ({"mlp_only_layers": [0, 2]}, "native, dense layers"),
        ({"mlp_only_layers": [0, 2], "num_experts": 4}, "native, fewer experts, dense layers"),
    ],
)  # fmt: skip
def test_native_forms(changes: dict[str, Any], kind: str) -> None:
    assert form_kind(QWEN | changes, QWEN) == kind


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        ({"num_experts": 6}, "own form, unequal experts"),
        ({"num_experts": 6, "rows": 8, "stand_in": "zero"}, "own form, zero stand-ins"),
        ({"num_experts": 6, "rows": 8, "stand_in": "copy"}, "own form, copy stand-ins"),
        ({"num_experts": 6, "rows": 8}, "own form, shared rows"),
        ({"width": 40}, "own form, dense layers"),
        ({"width": 0}, "own form, no MLP"),
        ({"num_experts": 8, "expert_width": 5}, "own form, narrower experts"),
        ({"num_experts": 8, "top_k": 1}, "own form, unequal experts per token"),
        ({"num_experts": 8, "own": {"mine": {}}}, "own form, another's structure"),
    ],
)
def test_our_own_form(layer: dict[str, Any], kind: str) -> None:
    values = own(layer_1=layer)
    assert form_kind(values, QWEN) == kind and family_named(values) == "qwen2_moe"
    older = QWEN | {"moe_lab": {"version": 1, "padding": 0, "layers": {"1": layer}}}
    assert form_kind(older, QWEN) == kind and family_named(older) == "qwen2_moe"


def test_several_words_stand_in_one_order() -> None:
    constant = {"num_experts": 6, "rows": 8, "stand_in": "constant"}
    values = own(layer_1=constant | {"num_experts": 4}, layer_2=constant, layer_3={"width": 0})
    assert form_kind(values, QWEN) == "own form, no MLP, unequal experts, constant stand-ins"
    assert set(form_kind(values, QWEN).split(", ")[1:]) <= FEATURES.keys()


def test_a_model_of_another_family_and_one_inside_a_wrapper() -> None:
    made = QWEN | {"mlp_only_layers": [2]}
    assert form_kind(made, MIXTRAL) == "native, of another family, dense layers"
    wrapper = {"model_type": "qwen3_vl_moe", "text_config": QWEN}
    fewer = wrapper | {"text_config": QWEN | {"num_experts": 4}}
    assert form_kind(fewer, wrapper) == "native, fewer experts"


@pytest.mark.parametrize("field", ["mlp_layer_types", "first_k_dense_replace"])
def test_each_way_to_name_dense_layers(field: str) -> None:
    values = {
        "mlp_layer_types": (["dense", "sparse"], ["dense", "dense"]),
        "first_k_dense_replace": (1, 2),
    }
    before, after = ({"model_type": "m", field: value} for value in values[field])
    assert form_kind(after, before) == "native, dense layers"
    assert form_kind(before, before) == "native"


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_what_transformers_writes(family: str, tmp_path: Path) -> None:
    tiny_model(family).config.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert form_kind(values, values) == "native" and family_named(values) == family


def test_narrower_experts_are_told() -> None:
    source = MIXTRAL | {"intermediate_size": 16}
    assert form_kind(source | {"intermediate_size": 8}, source) == "native, narrower experts"
    uneven = own(layer_1={"num_experts": 8, "expert_widths": [3, 0, 4, 1, 1, 1, 1, 1]})
    assert form_kind(uneven, QWEN) == "own form, experts of different widths"
    shared = own(layer_1={"num_experts": 8, "expert_width": 4, "shared_width": 4})
    assert form_kind(shared, QWEN) == "own form, narrower experts, narrower shared experts"
