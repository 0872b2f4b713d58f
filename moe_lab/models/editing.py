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

from moe_lab.models.layers import (
    MoELayer,
    by_expert,
    expert_forward,
    expert_parameters,
    hidden_of,
    routed_modules,
    rows_of,
)
from moe_lab.models.remapped import places_of, remap, shared_places
from moe_lab.types import LayerInfo, UserError


class DenseMLP(nn.Module):
    """A gated dense MLP, down(act(gate(x)) * up(x)), of any width per layer."""

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

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return y


class NoMLP(nn.Module):
    """A block that adds nothing: zeros. `pair`: its decoder layer expects (output, None)."""

    def __init__(self, pair: bool):
        super().__init__()
        self.pair = pair

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, None]:
        zeros = torch.zeros_like(x)
        return (zeros, None) if self.pair else zeros


@torch.no_grad()
def no_mlp(layer: MoELayer) -> NoMLP:
    """What stands in for a dropped MoE block; what the block returns is found by one token."""
    reference = layer.experts.down_proj
    x_BLD = torch.zeros(
        1, 1, layer.info.hidden_size, dtype=reference.dtype, device=reference.device
    )
    layer.experts.forward = lambda hidden, *routed, **named: torch.zeros_like(hidden)
    try:
        return NoMLP(pair=isinstance(layer.block(x_BLD), tuple))
    finally:
        del layer.experts.forward


def prune_layer(layer: MoELayer, kept: Sequence[int], rows: bool = True) -> None:
    """Keep only the `kept` experts of a layer, in that order, in place.

    rows: whether the router loses the other rows; where not, `remapped.remap` must say at once
    where they lead.
    """
    old, kept = layer.info.num_experts, list(kept)
    modules = routed_modules(layer) if rows else list(layer.experts.modules())
    found = [(*one, rows_of(layer, *one[2:], kept)) for one in by_expert(layer)]
    for module, key, tensor, dimension, places in found:
        if module not in modules:
            continue
        index = torch.tensor(places, device=tensor.device)
        cut = tensor.detach().index_select(dimension, index)
        if isinstance(tensor, nn.Parameter):
            cut = nn.Parameter(cut, tensor.requires_grad)
        setattr(module, key, cut)
    for module in modules:
        for key, value in vars(module).items():
            if "expert" in key and type(value) is int and value == old:
                setattr(module, key, len(kept))


@torch.no_grad()
def replace_experts(
    layer: MoELayer, kept: Sequence[int], stand_in: str, constants_RD: Tensor | None = None
) -> None:
    """Keep only the `kept` experts, in place, and all router rows: the others get a stand-in.

    stand_in, constants_RD: as of `remapped.remap`, the R removed experts in ascending order.
    """
    places = places_of(kept, layer.info.num_experts)
    prune_layer(layer, kept, rows=False)
    remap(layer.experts, places, stand_in, constants_RD)


@torch.no_grad()
def share_experts(layer: MoELayer, kept: Sequence[int], groups: Sequence[Sequence[int]]) -> None:
    """Keep only the `kept` experts, in place, and all router rows: groups[i] lead to kept[i]."""
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
    for module, _, tensor, dimension in by_expert(layer):
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


@torch.no_grad()
def check_is_sum(layer: MoELayer) -> None:
    """Refuse a block that is not shared(x) + sum_k weight_k * E_k(x), by trying it on 8 tokens.

    Some families scale or average the sum afterwards; condensing would forget that.
    """
    reference = layer.experts.down_proj
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(8, layer.info.hidden_size, generator=generator).to(reference)
    _, weight_TK, index_TK = layer.router(x_TD)
    parameters = expert_parameters(layer.experts)
    expected = torch.zeros_like(x_TD)
    for token, (weights, indices) in enumerate(zip(weight_TK, index_TK.tolist(), strict=True)):
        for weight, expert in zip(weights, indices, strict=True):
            y_D = expert_forward(layer.experts, parameters[expert], x_TD[token : token + 1])[0]
            expected[token] += weight * y_D
    if layer.shared is not None:
        gate = 1.0 if layer.shared_gate is None else layer.shared_gate(x_TD).sigmoid()
        expected += gate * layer.shared(x_TD)
    output = hidden_of(layer.block(x_TD[None]))[0]
    scale = expected.abs().max()
    if (output - expected).abs().max() > 0.02 * scale:
        raise UserError(
            f"{type(layer.block).__name__} does more than add its shared and routed experts: this "
            "family cannot be condensed yet"
        )


def part_widths(info: LayerInfo, experts: Sequence[int]) -> tuple[int, ...]:
    """Hidden units of each part of the layer condensed to `experts`, in `condensed`'s order."""
    return ((info.shared_width,) if info.shared else ()) + (info.expert_width,) * len(experts)


def condensed(
    layer: MoELayer, experts: Sequence[int], gates: Sequence[float], shared_gate: float
) -> DenseMLP:
    """The layer as one dense MLP: shared_gate * shared(x) + sum_i gates[i] * E_experts[i](x).

    CD-MoE (2412.00069 section 3): rows of the shared and the chosen experts are concatenated and
    each constant gate is folded into its columns of the down projection.
    """
    gate: list[Tensor] = []
    up: list[Tensor] = []
    down: list[Tensor] = []
    if layer.shared is not None:
        gate.append(layer.shared.get_parameter("gate_proj.weight"))
        up.append(layer.shared.get_parameter("up_proj.weight"))
        down.append(layer.shared.get_parameter("down_proj.weight") * shared_gate)
    for expert, weight in zip(experts, gates, strict=True):
        gate_part, up_part = layer.experts.gate_up_proj[expert].chunk(2)
        gate.append(gate_part)
        up.append(up_part)
        down.append(layer.experts.down_proj[expert] * weight)
    if not gate:
        raise UserError(
            f"{layer.info.name} has no shared expert: a condensed layer without routed experts "
            "would be empty; ask for condense.num_routed of at least 1"
        )
    width = sum(part.shape[0] for part in gate)
    reference = gate[0]
    dense = DenseMLP(
        layer.info.hidden_size, width, layer.experts.act_fn, device="meta", dtype=reference.dtype
    )
    whole = (torch.cat(gate), torch.cat(up), torch.cat(down, dim=1))
    for linear, part in zip((dense.gate_proj, dense.up_proj, dense.down_proj), whole, strict=True):
        linear.weight = nn.Parameter(part.detach().clone(), requires_grad=False)
    return dense


def edited_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks that edits put in the place of MoE blocks, by their path in the model."""
    return {n: m for n, m in model.named_modules() if type(m) in (DenseMLP, NoMLP)}


def width_of(block: nn.Module) -> int:
    """Hidden units of a dense MLP; 0 of a block that adds nothing."""
    return 0 if type(block) is NoMLP else block.get_parameter("gate_proj.weight").shape[0]


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
    return replace(layer, **copies)
