"""A condensed layer: one dense MLP where that says it, else the family's block with one expert.

CD-MoE (2412.00069 section 3): rows of the shared and the chosen experts are concatenated and each
constant gate is folded into its columns of the down projection. A dense gated MLP is that where
the block is a plain sum of gated MLPs. Elsewhere (other activations, biases, projections or norms
around the experts) the chosen experts become one wide expert of the family's own formula, and all
else of the block stays, also its router where something behind it needs more than the choice.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.integrations.moe import _default_apply_gate

from moe_lab.models.editing import DenseMLP, NoMLP
from moe_lab.models.experts import (
    Experts,
    OneExpert,
    expert_forward,
    expert_parameters,
    scales_input,
)
from moe_lab.models.hidden_units import HiddenUnits
from moe_lab.models.layers import MoELayer, is_gated_mlp
from moe_lab.models.probing import (
    Terms,
    on_cpu,
    probe,
    router_output,
    skeleton_output,
    terms,
    what_else_weights_do,
)
from moe_lab.models.widths import first_units, set_widths
from moe_lab.types import LayerInfo, UserError

TRIED = 8  # tokens


def part_widths(info: LayerInfo, experts: Sequence[int]) -> tuple[int, ...]:
    """Hidden units of each part of the layer condensed to `experts`, in `condensed`'s order."""
    return ((info.shared_width,) if info.shared else ()) + (info.expert_width,) * len(experts)


def dense_terms(layer: MoELayer) -> Terms | None:
    """The factors of routed and shared experts where one dense gated MLP is the layer; else None.

    The layer may be on the meta device.
    """
    experts = layer.experts
    plain = (
        experts.has_gate
        and not experts.has_bias
        and not experts.is_transposed
        and experts.is_concatenated
        and type(experts)._apply_gate is _default_apply_gate
    )
    if not plain or not _is_plain_mlp(layer.shared, experts.act_fn):
        return None
    factors = terms(layer)
    returns_more = factors is not None and isinstance(skeleton_output(layer), tuple)
    return None if returns_more else factors


def _is_plain_mlp(shared: nn.Module | None, activation: Callable[[Tensor], Tensor]) -> bool:
    """Whether the shared experts, where there are any, are a gated MLP without biases."""
    if shared is None:
        return True
    biases = [name for name, _ in shared.named_parameters() if name.endswith("bias")]
    return not biases and is_gated(shared, activation)


@on_cpu()
def is_gated(module: nn.Module, activation: Callable[[Tensor], Tensor]) -> bool:
    """Whether a module is down(activation(gate(x)) * up(x)): tried with small random weights."""
    if not is_gated_mlp(module):
        return False
    shapes = {"gate_proj": (6, 4), "up_proj": (6, 4), "down_proj": (4, 6)}
    known = {id(getattr(module, name)): nn.Linear(1, 1, bias=False) for name in shapes}
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(shape, generator=generator) for shape in shapes.values()]
    for linear, weight in zip(known.values(), parts, strict=True):
        linear.weight = nn.Parameter(weight * 3)
    memo: dict[int, Any] = dict(known)
    if (config := vars(module).get("config")) is not None:
        memo[id(config)] = config
    x = torch.randn(5, 4, generator=generator) * 3
    gate, up, down = known.values()
    expected: Tensor = down(activation(gate(x)) * up(x))
    return torch.allclose(copy.deepcopy(module, memo)(x), expected, rtol=1e-4, atol=1e-4)


def condensed(
    layer: MoELayer, experts: Sequence[int], gates: Sequence[float], shared_gate: float
) -> nn.Module:
    """The layer as shared_gate * shared(x) + sum_i gates[i] * E_experts[i](x).

    A `DenseMLP`, or where that cannot say it the layer's own block, changed in place.
    """
    check_condensable(layer)
    if not experts and layer.shared is None:
        raise UserError(
            f"{layer.info.name} has no shared expert: a condensed layer without routed experts "
            "would be empty; ask for condense.num_routed of at least 1"
        )
    factors = dense_terms(layer)
    if factors is None:
        return _condensed_in_place(layer, experts, gates, shared_gate)
    gate: list[Tensor] = []
    up: list[Tensor] = []
    down: list[Tensor] = []
    if layer.shared is not None:
        gate.append(layer.shared.get_parameter("gate_proj.weight"))
        up.append(layer.shared.get_parameter("up_proj.weight"))
        shared_down = layer.shared.get_parameter("down_proj.weight")
        down.append(shared_down * (shared_gate * factors.shared))
    for expert, weight in zip(experts, gates, strict=True):
        gate_part, up_part = layer.experts.gate_up_proj[expert].chunk(2)
        gate.append(gate_part)
        up.append(up_part)
        down.append(layer.experts.down_proj[expert] * (weight * factors.routed))
    width = sum(part.shape[0] for part in gate)
    activation = layer.experts.act_fn
    dense = DenseMLP(layer.info.hidden_size, width, activation, device="meta", dtype=gate[0].dtype)
    whole = (torch.cat(gate), torch.cat(up), torch.cat(down, dim=1))
    for linear, part in zip((dense.gate_proj, dense.up_proj, dense.down_proj), whole, strict=True):
        linear.weight = nn.Parameter(part.detach().clone(), requires_grad=False)
    return dense


@torch.no_grad()
def check_condensable(layer: MoELayer) -> None:
    """Refuse experts that are no sum of what the family's formula makes of each; tried on 8 tokens.

    A layer on the meta device passes.
    """
    if layer.info.obstacle:
        raise UserError(f"layer {layer.info.index} cannot be condensed: {layer.info.obstacle}")
    reference = layer.experts.down_proj
    if reference.is_meta:
        return
    number, size = layer.info.num_experts, _input_size(layer.experts)
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(TRIED, size, generator=generator).to(reference)
    index_TK = torch.arange(2 * TRIED, device=reference.device).reshape(TRIED, 2) % number
    weight_TK = torch.rand(TRIED, 2, generator=generator).to(reference)
    expected = torch.zeros_like(x_TD)
    parameters = expert_parameters(layer.experts)
    weighs_input = scales_input(layer.experts)
    for token, (indices, weights) in enumerate(zip(index_TK.tolist(), weight_TK, strict=True)):
        for expert, weight in zip(indices, weights, strict=True):
            inside, outside = (weight, 1.0) if weighs_input else (1.0, weight)
            x_1D = inside * x_TD[token : token + 1]
            expected[token] += outside * expert_forward(layer.experts, parameters[expert], x_1D)[0]
    output = layer.experts(x_TD, index_TK, weight_TK)
    exact = reference.dtype in (torch.float32, torch.float64)
    if (output - expected).abs().max() > (1e-4 if exact else 2e-2) * expected.abs().max():
        raise UserError(
            f"{type(layer.experts).__name__} does more than add its experts' weighted outputs: "
            "this family cannot be condensed"
        )


def _input_size(experts: Experts) -> int:
    up = experts.gate_up_proj if experts.has_gate else experts.up_proj
    return up.shape[1 if experts.is_transposed else 2]


# ------------------------------------------------------------------ in the family's own block


class OnlyExpert(nn.Module):
    """In a router's place: every token goes to the one expert that is left, with weight 1.

    router: asked all the same where its block needs more of it than the choice, else None.
    """

    def __init__(self, router: nn.Module | None):
        super().__init__()
        self.router = router

    def forward(self, hidden_states: Tensor, *further: Any, **named: Any) -> tuple[Any, ...]:
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        weight = x_TD.new_ones(len(x_TD), 1)
        index = torch.zeros(len(x_TD), 1, dtype=torch.long, device=x_TD.device)
        if self.router is None:
            return weight, weight, index
        logits, _, _, *rest = self.router(hidden_states, *further, **named)
        return logits, weight, index, *rest


class ConstantGate(nn.Module):
    """In the place of the gate of the shared experts: one logit for all tokens."""

    def __init__(self, logit: Tensor):
        super().__init__()
        self.logit = nn.Parameter(logit, requires_grad=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        shape = (*hidden_states.shape[:-1], 1)
        return self.logit.to(hidden_states.dtype).expand(shape)


def _condensed_in_place(
    layer: MoELayer, experts: Sequence[int], gates: Sequence[float], shared_gate: float
) -> nn.Module:
    if not experts:
        raise UserError(
            f"layer {layer.info.index}: {type(layer.block).__name__} is no plain sum of gated "
            "MLPs, so that its block is kept, which needs an expert: ask for condense.num_routed "
            "of at least 1"
        )
    if why := what_else_weights_do(layer):
        raise UserError(f"layer {layer.info.index} cannot be condensed: {why}")
    if layer.shared_gate is None and shared_gate != 1.0:
        raise UserError(
            f"layer {layer.info.index} has no gate before its shared experts: shared_gate="
            f"{shared_gate:g} cannot be said"
        )
    for name, tensor in _widened(layer.experts, experts, gates).items():
        setattr(layer.experts, name, nn.Parameter(tensor.detach().clone(), requires_grad=False))
    _leave_one(layer)
    if isinstance(gate := getattr(layer.block, "shared_expert_gate", None), ConstantGate):
        logit = torch.logit(torch.tensor([shared_gate], dtype=torch.float64))
        gate.logit.data = logit.to(gate.logit)
    return layer.block


def one_wide_expert(layer: MoELayer, width: int) -> nn.Module:
    """The same of a layer without weights, whose one expert has so many hidden units."""
    for name, tensor in _widened(layer.experts, [0], [1.0]).items():
        setattr(layer.experts, name, nn.Parameter(tensor, requires_grad=False))
    set_width(layer, width)
    _leave_one(layer)
    return layer.block


def set_width(layer: MoELayer, width: int) -> None:
    """Give each expert of a layer so many hidden units, whose weights are still to come."""
    units = HiddenUnits(layer.experts)
    widths = (min(width, units.width),) * len(layer.experts.down_proj)
    units.keep(first_units(widths, width))


def _leave_one(layer: MoELayer) -> None:
    experts, block = layer.experts, layer.block
    set_widths(experts, ())
    experts.__class__ = _one(type(experts))  # type: ignore[arg-type]  # a class can be hashed
    experts.num_experts = 1
    cast(OneExpert, experts).num_routed = layer.info.num_experts
    keeps = len(router_output(layer, probe(layer, tokens=1))) > 3
    for name, module in list(block.named_children()):
        if module is layer.router:
            setattr(block, name, OnlyExpert(module if keeps else None))
        elif module is layer.shared_gate:
            logit = experts.down_proj.new_zeros(1)
            setattr(block, name, ConstantGate(logit))


def _unit_axes(experts: Experts) -> dict[str, int]:
    """Of each tensor of an experts module that has them: the dimension of hidden units."""
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    rows, columns = (2, 1) if experts.is_transposed else (1, 2)
    axes = {up: rows, "down_proj": columns}
    return axes | ({f"{up}_bias": 1} if experts.has_bias else {})


def _widened(experts: Experts, chosen: Sequence[int], gates: Sequence[float]) -> dict[str, Tensor]:
    """The tensors [1, ...] of one expert that is sum_i gates[i] * E_chosen[i](x).

    Of families whose weights multiply what an expert gets, sum_i E_chosen[i](gates[i] * x).
    """
    axes = _unit_axes(experts)
    made = {}
    for name, axis in axes.items():
        tensor = getattr(experts, name)
        halves = experts.has_gate and experts.is_concatenated and name != "down_proj"
        parts = [tensor[expert] for expert in chosen]
        if (name == "down_proj") != scales_input(experts):
            parts = [part * gate for part, gate in zip(parts, gates, strict=True)]
        if halves:
            pairs = [part.chunk(2, dim=axis - 1) for part in parts]
            parts = [gate for gate, _ in pairs] + [up for _, up in pairs]
        made[name] = torch.cat(parts, dim=axis - 1)[None]
    if experts.has_bias:
        biases = experts.get_parameter("down_proj_bias")[list(chosen)]
        factor = torch.tensor(list(gates), dtype=torch.float64, device=biases.device)
        made["down_proj_bias"] = (factor[:, None] * biases).sum(dim=0, keepdim=True).to(biases)
    return made


@functools.cache
def _one(kind: type[Experts]) -> type[OneExpert]:
    return type(f"One{kind.__name__}", (OneExpert, kind), {"__module__": __name__})


# ------------------------------------------------------------------ told apart


def is_condensed_in_place(module: nn.Module) -> bool:
    """Whether a module is a family's block of which one expert was left."""
    return any(isinstance(part, OneExpert) for part in module.children())


def edited_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks that edits put in the place of MoE blocks, or left of them, by their path."""
    return {
        path: module
        for path, module in model.named_modules()
        if type(module) in (DenseMLP, NoMLP) or is_condensed_in_place(module)
    }


def width_of(block: nn.Module) -> int:
    """Hidden units of a condensed layer; 0 of a block that adds nothing."""
    if type(block) is NoMLP:
        return 0
    for part in block.children():
        if isinstance(part, OneExpert):
            return part.down_proj.shape[1 if part.is_transposed else 2]
    return block.get_parameter("gate_proj.weight").shape[0]
