"""Operations on the MoE layers of a loaded model: removing, condensing and dropping.

Which of them an edit takes is said in `edits/`. What they leave computes the edited function at
once; `forms.py` finds the form in which stock transformers can hold it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moe_lab.models.hashed import is_hashed, remap_tokens
from moe_lab.models.layers import (
    MoELayer,
    by_expert,
    counts_of,
    routed_modules,
    rows_of,
)
from moe_lab.models.probing import hands_state_on, skeleton_output
from moe_lab.models.remapped import places_of, remap, shared_places
from moe_lab.models.skipping import check_not_skipping
from moe_lab.models.widths import keep_widths, widths_of
from moe_lab.types import UserError


class DenseMLP(nn.Module):
    """A gated dense MLP, down(act(gate(x)) * up(x)), of any width per layer.

    What some families hand their blocks beside the hidden states does not concern it.
    """

    def __init__(
        self,
        hidden_size: int,
        width: int,
        activation: Callable[[Tensor], Tensor],
        **factory: object,
    ):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False, **factory)
        self.up_proj = nn.Linear(hidden_size, width, bias=False, **factory)
        self.down_proj = nn.Linear(width, hidden_size, bias=False, **factory)
        self.act_fn = activation

    def forward(self, x: Tensor, **further: object) -> Tensor:
        y: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return y


class NoMLP(nn.Module):
    """A block that adds nothing: zeros. `pair`: its decoder layer expects (output, None)."""

    def __init__(self, pair: bool):
        super().__init__()
        self.pair = pair

    def forward(self, x: Tensor, *rest: object, **further: object) -> Tensor | tuple[Tensor, None]:
        zeros = torch.zeros_like(x)
        return (zeros, None) if self.pair else zeros


@torch.no_grad()
def no_mlp(layer: MoELayer) -> NoMLP:
    """What stands in for a dropped MoE block; what the block returns is found by a few tokens.

    Raises UserError where the decoder layer must have more of its block than what it adds.
    """
    if not layer.has_block:
        raise UserError(
            f"layer {layer.info.index}: router and experts of {layer.info.family} stand in the "
            "decoder layer itself, beside a dense MLP: there is no MoE block that could be dropped"
        )
    if hands_state_on(layer):
        raise UserError(
            f"layer {layer.info.index}: {type(layer.block).__name__} hands a state of its router "
            "on to the layers behind it: it cannot be dropped"
        )
    output = skeleton_output(layer)
    if isinstance(output, tuple) and len(output) != 2:
        raise UserError(
            f"layer {layer.info.index}: {type(layer.block).__name__} returns {len(output)} values, "
            "of which only two are known what for: it cannot be dropped"
        )
    return NoMLP(pair=isinstance(output, tuple))


def prune_layer(
    layer: MoELayer,
    kept: Sequence[int],
    rows: bool = True,
    into: Mapping[int, int] | None = None,
) -> None:
    """Keep only the `kept` experts of a layer, in that order, in place.

    rows: whether the router loses the other rows; where not, `remapped.remap` must say at once
    where they lead. into: the kept expert that another one went into, for routers that choose by
    token id (`hashed.py`).
    """
    modules = routed_modules(layer) if rows else list(layer.experts.modules())
    counts = [place for place in counts_of(layer) if place[0] in modules]
    if rows and is_hashed(layer):
        remap_tokens(layer, kept, into or {})
    widths = widths_of(layer.experts)
    found = [(*one, rows_of(layer, *one[2:], kept)) for one in by_expert(layer)]
    for module, key, tensor, dimension, places in found:
        if module not in modules:
            continue
        cut = tensor.detach().index_select(dimension, torch.tensor(places, device=tensor.device))
        if isinstance(tensor, nn.Parameter):
            cut = nn.Parameter(cut, tensor.requires_grad)
        setattr(module, key, cut)
    for module, key, number in counts:
        setattr(module, key, number - layer.info.num_experts + len(kept))
    keep_widths(layer.experts, widths, kept)


@torch.no_grad()
def replace_experts(
    layer: MoELayer, kept: Sequence[int], stand_in: str, constants_RD: Tensor | None = None
) -> None:
    """Keep only the `kept` experts, in place, and all router rows: the others get a stand-in.

    stand_in, constants_RD: as of `remapped.remap`, the R removed experts in ascending order.
    """
    check_not_skipping(layer)
    places = places_of(kept, layer.info.num_experts)
    prune_layer(layer, kept, rows=False)
    remap(layer.experts, places, stand_in, constants_RD)


@torch.no_grad()
def share_experts(layer: MoELayer, kept: Sequence[int], groups: Sequence[Sequence[int]]) -> None:
    """Keep only the `kept` experts, in place, and all router rows: groups[i] lead to kept[i]."""
    check_not_skipping(layer)
    places = shared_places(groups, layer.info.num_experts)
    prune_layer(layer, kept, rows=False)
    remap(layer.experts, places)


@torch.no_grad()
def merge_router_rows(
    layer: MoELayer,
    kept: Sequence[int],
    groups: Sequence[Sequence[int]],
    weights: Sequence[Sequence[float]] | None,
) -> None:
    """Make kept[i]'s router row the sum of those of groups[i], times weights[i], in place.

    weights: None for the plain sum. Entries of the router's biases are summed alike.
    """
    for module, key, tensor, dimension in by_expert(layer):
        if tensor.dim() == 1 and "bias" not in key:
            continue  # a factor, which stays that of the expert that stays
        if module in layer.experts.modules():
            continue
        rows = tensor.movedim(dimension, 0)
        merged = []
        for place, members in enumerate(groups):
            shares = [1.0] * len(members) if weights is None else weights[place]
            factor = rows.new_tensor(shares, dtype=torch.float64)
            merged.append(torch.einsum("g,g...->...", factor, rows[list(members)].double()))
        rows[list(kept)] = torch.stack(merged).to(rows.dtype)


def plan_tensor(
    tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], why: str
) -> Tensor:
    """One of a plan's tensors; why: what needs it, for the UserError where it is not as needed."""
    given = tuple(tensors[name].shape) if name in tensors else None
    if given != shape:
        raise UserError(
            f"{why}: its tensor {name} must have the shape {shape}, and "
            + (f"has {given}" if given else "is missing (plan.safetensors lies beside plan.json)")
        )
    return tensors[name]


def constants_name(index: int) -> str:
    """What a plan calls the constants of decoder layer `index` among its tensors."""
    return f"layers.{index}.constants"


def set_block(model: nn.Module, name: str, block: nn.Module) -> nn.Module:
    """Put `block` at the path `name` of a model; returns what stood there."""
    parent, _, child = name.rpartition(".")
    holder = model.get_submodule(parent)
    previous: nn.Module = getattr(holder, child)
    setattr(holder, child, block)
    return previous


@torch.no_grad()
def copied_layer(layer: MoELayer) -> MoELayer:
    """A copy of a layer whose block can be edited while the layer stays.

    It shares the model's config, so that it computes its experts as the model does, and has no
    hooks.
    """
    config = layer.experts.config
    block = copy.deepcopy(layer.block, {id(config): config})
    for module in block.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            hooks.clear()
    copied = dict(zip(layer.block.modules(), block.modules(), strict=True))
    parts = ("block", "router", "experts", "shared", "shared_gate")
    copies: dict[str, Any] = {name: copied.get(getattr(layer, name)) for name in parts}
    if not layer.has_block:
        copies["decoder"] = block
    return replace(layer, **copies)
