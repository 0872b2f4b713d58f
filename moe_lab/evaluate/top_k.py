"""The numbers of experts per token at which every variant is evaluated beside its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from moe_lab.models.checkpoint import Checkpoint, meta_model
from moe_lab.models.factorized import FactorizedExperts
from moe_lab.models.layers import moe_layers
from moe_lab.models.routers import set_top_k
from moe_lab.types import LayerInfo, UserError


def with_top_k(
    variants: dict[str, Checkpoint], wanted: Sequence[int], named: Sequence[int] | None
) -> dict[str, Checkpoint]:
    """The variants, each followed by itself with other numbers of experts per token.

    Those are named <variant>_top_<k>. A variant that has fewer experts, or no MoE layer any more,
    has no such follower, nor has one with repeated experts, where a token's second would be its
    first once more, nor one with factorised layers, whose routers would keep their own number; one
    that has that k as its own only where it is among the named, which a suite asks for, so that all
    can be compared.
    """
    if not wanted:
        return variants
    every = {}
    for name, checkpoint in variants.items():
        every[name] = checkpoint
        model = meta_model(checkpoint.config)
        factors = any(isinstance(module, FactorizedExperts) for module in model.modules())
        layers = [] if factors else [layer.info for layer in moe_layers(model)]
        for top_k in wanted if layers else ():
            own = {info.top_k for info in layers} == {top_k}
            possible = top_k <= _most_top_k(layers) and not checkpoint.repeats_experts
            if top_k in (named or ()) if own else possible:
                every[f"{name}_top_{top_k}"] = replace(checkpoint, top_k=top_k)
    return every


def other_top_k(
    named: Sequence[int] | None, final: int | None, config: Any, layers: Sequence[LayerInfo]
) -> list[int]:
    """At which numbers of experts per token all variants are evaluated beside their own.

    named: what a suite asks for, None where it leaves it to the recipe; final: what a recipe ends
    with, None for the model's own. UserError for impossible ones, and for a model of this config
    whose routers do not obey.
    """
    wanted = named if named is not None else [final] if final else []
    most = _most_top_k(layers)
    for top_k in wanted:
        if not 1 <= top_k <= most:
            raise UserError(f"eval.top_k={list(wanted)}: a token can get 1 to {most} experts")
        if {info.top_k for info in layers} != {top_k}:
            set_top_k(meta_model(config), top_k)
    return list(dict.fromkeys(wanted))


def _most_top_k(layers: Sequence[LayerInfo]) -> int:
    """The most experts per token: no layer has more within the groups that a token may use."""
    return min(info.num_experts // info.groups * info.groups_used for info in layers)
