"""A model's structure as a config group's option states it, and a checkpoint that differs from it.

An architecture is the fields of a config that decide which tensors there are and how tokens are
routed, as `transformers.AutoConfig.for_model` takes them; a wrapper's text_config is nested.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import AutoConfig

from moe_lab.types import UserError

Architecture = Mapping[str, Any]


def config_of(architecture: Architecture) -> Any:
    """The config that transformers makes of it; UserError where it makes none."""
    try:
        return AutoConfig.for_model(**architecture)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"model.architecture is no config that transformers can make: {error}; "
            "model.architecture=null compares nothing"
        ) from error


def differences(config: Any, architecture: Architecture) -> list[str]:
    """Each field in which a checkpoint's config is another one, with both values.

    Of another model_type nothing but that is told: its fields have other names.
    """
    return list(_differences(config, config_of(architecture), architecture, ""))


def _differences(
    config: Any, expected: Any, architecture: Architecture, above: str
) -> Iterator[str]:
    kinds = [getattr(one, "model_type", None) for one in (config, expected)]
    names = architecture if kinds[0] == kinds[1] else ("model_type",)
    for name in names:
        found, wanted = getattr(config, name, None), getattr(expected, name)
        inner = architecture.get(name)
        if isinstance(inner, Mapping):
            yield from _differences(found, wanted, inner, f"{above}{name}.")
        elif found != wanted:
            yield f"{above}{name} {_word(found)} (not {_word(wanted)})"


def _word(value: Any) -> str:
    if not isinstance(value, list) or len(value) <= 4:
        return str(value)
    return f"[{value[0]}, … {len(value)} of them]"
