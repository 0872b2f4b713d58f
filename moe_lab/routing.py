"""Changing what routers do: how many experts a token gets, and among which experts they choose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from moe_lab.moe import TOP_K_FIELDS, MoELayer, by_expert, moe_layers, routed_modules
from moe_lab.types import UserError


def set_top_k(model: nn.Module, top_k: int) -> None:
    """Make every router of a model choose `top_k` experts per token, and its config say so.

    The model may be on the meta device. Raises UserError, and changes nothing, where a layer has
    fewer experts or the family's routers do not obey.
    """
    layers = moe_layers(model)
    for layer in layers:
        if not 1 <= top_k <= layer.info.num_experts:
            raise UserError(
                f"top_k={top_k}: layer {layer.info.index} has {layer.info.num_experts} experts, so "
                f"that a token can get 1 to {layer.info.num_experts} of them"
            )
    config = model.config.get_text_config()
    holders: list[Any] = [config, *(m for layer in layers for m in routed_modules(layer))]
    before = [
        (holder, field, getattr(holder, field))
        for holder in holders
        for field in TOP_K_FIELDS
        if type(getattr(holder, field, None)) is int
    ]
    for holder, field, _ in before:
        setattr(holder, field, top_k)
    if any(chosen_by(layer) != top_k for layer in layers):
        for holder, field, value in before:
            setattr(holder, field, value)
        raise UserError(
            f"top_k={top_k}: routers of the family {config.model_type!r} choose "
            f"{chosen_by(layers[0])} experts for each token whatever their config says"
        )


@torch.no_grad()
def chosen_by(layer: MoELayer) -> int:
    """How many experts the layer's router gives a token, found by giving it one."""
    reference = next(layer.router.parameters())
    x_TD = torch.zeros(1, layer.info.hidden_size, dtype=reference.dtype, device=reference.device)
    return layer.router(x_TD)[2].shape[-1]


@contextmanager
def restricted(model: nn.Module, kept: Mapping[int, Sequence[int]]) -> Iterator[None]:
    """While open, the MoE layers `kept` names by true index have only these experts.

    As `moe.prune_layer` would leave them, but no expert's weights are copied or changed: a router
    works on its kept rows alone (gradients reach those), and its indices are mapped back.
    """
    layers = {layer.info.index: layer for layer in moe_layers(model)}
    with ExitStack() as stack:
        for index, experts in kept.items():
            stack.enter_context(_restricted_layer(layers[index], list(experts)))
        yield


@contextmanager
def _restricted_layer(layer: MoELayer, kept: list[int]) -> Iterator[None]:
    router = layer.router
    modules = {module: name for name, module in router.named_modules()}
    others = (
        {module for module, *_ in by_expert(layer)} - set(modules) - set(layer.experts.modules())
    )
    if others:
        raise UserError(
            f"{type(layer.block).__name__} keeps tensors of its experts in "
            f"{', '.join(type(module).__name__ for module in others)}, outside its router: this "
            "family's experts cannot be left out for a while; prune them instead"
        )
    rows = [
        (f"{modules[module]}.{key}".lstrip("."), dimension)
        for module, key, _, dimension in by_expert(layer)
        if module in modules
    ]
    counts = [
        (module, key)
        for module in modules
        for key, value in vars(module).items()
        if "expert" in key and type(value) is int and value == layer.info.num_experts
    ]
    kept_E = torch.tensor(kept, device=layer.experts.down_proj.device)

    def forward(*arguments: Any, **named: Any) -> tuple[Tensor, ...]:
        tensors = dict(router.named_parameters()) | dict(router.named_buffers())
        cut = {name: tensors[name].index_select(size, kept_E) for name, size in rows}
        del router.forward
        try:
            logits, weights, index, *rest = functional_call(router, cut, arguments, named)
        finally:
            router.forward = forward
        return logits, weights, kept_E[index], *rest

    for module, key in counts:
        setattr(module, key, len(kept))
    router.forward = forward
    try:
        yield
    finally:
        del router.forward
        for module, key in counts:
            setattr(module, key, layer.info.num_experts)
