"""How many experts a token gets, in a family's config: one number for all layers."""

from __future__ import annotations

import copy
from typing import Any

from moe_lab.models.checkpoint import meta_model
from moe_lab.models.layers import MoELayer
from moe_lab.models.own_config import without_structures
from moe_lab.models.own_form import differing_layers
from moe_lab.models.routers import set_top_k
from moe_lab.types import UserError


def config_of_one_top_k(config: Any, layers: list[MoELayer]) -> Any:
    """A config that says how many experts a token gets where that is one other number everywhere.

    The same one where it is said already, or cannot be.
    """
    numbers = {layer.info.top_k for layer in layers}
    if len(numbers) != 1 or not top_k_obstacle(config, layers):
        return config
    built = meta_model(copy.deepcopy(config))
    try:
        set_top_k(built, *numbers)
    except UserError:  # such as one that has other layers, of another number of experts
        return config
    told: Any = without_structures(built.config)
    return told if not top_k_obstacle(told, layers) else config


def top_k_obstacle(config: Any, layers: list[MoELayer]) -> str | None:
    """In words which layers' routers choose another number of experts; None where none does."""
    found = differing_layers(config, layers)
    if values := {index: one["top_k"] for index, one in found.items() if "top_k" in one}:
        numbers = " and ".join(map(str, sorted(set(values.values()))))
        return f"layers {sorted(values)} choose {numbers} experts"
    return None
