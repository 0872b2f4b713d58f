"""Experts of a layer whose matrices are factors (`factors.py`): the module in their place.

Everything else of the block stays: its router, its shared experts, and how it calls its experts.
The module is none of the family's experts modules, so that what looks for MoE layers
(`layers.moe_layers`) does not see the layer any more. Letters: see `types.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import _default_apply_gate

from moe_lab.models.adapters.base import AdaptedExperts
from moe_lab.models.editing import prune_layer
from moe_lab.models.experts import Experts, scales_input
from moe_lab.models.factors import Factors, Spec, StackShape, factors_of
from moe_lab.models.layers import MoELayer
from moe_lab.models.widths import is_uneven
from moe_lab.types import UserError

GATE_UP_DOWN = ("gate", "up", "down")


class FactorizedExperts(nn.Module):
    """sum_k weight_k down_e(act(gate_e(x)) * up_e(x)), e the k-th chosen expert of a token.

    gate, up, down: the factors of all experts; top_k: how many a token gets, as its router said.
    """

    def __init__(
        self,
        shapes: Mapping[str, StackShape],
        specs: Mapping[str, Spec],
        activation: Callable[[Tensor], Tensor],
        top_k: int,
        like: Tensor,
    ):
        super().__init__()
        self.gate_factors, self.up_factors, self.down_factors = (
            factors_of(shapes[name], specs[name], like) for name in GATE_UP_DOWN
        )
        self.act_fn = activation
        self.num_experts, self.top_k = shapes["down"][0], top_k

    @property
    def factors(self) -> dict[str, Factors]:
        """Of each of the three matrices."""
        return dict(
            zip(GATE_UP_DOWN, (self.gate_factors, self.up_factors, self.down_factors), strict=True)
        )

    def forward(self, hidden_states: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """The experts' weighted sum [T, D]; an index of num_experts is nobody's."""
        gate, up, down = self.gate_factors, self.up_factors, self.down_factors
        gate_in, up_in = gate.inner(hidden_states), up.inner(hidden_states)
        sum_TS = hidden_states.new_zeros(len(hidden_states), down.core_size)
        for expert in _chosen(index_TK, self.num_experts):
            token, place = (index_TK == expert).nonzero(as_tuple=True)
            h_gate = gate.outer(gate.core(expert, gate_in[token]))
            h_up = up.outer(up.core(expert, up_in[token]))
            y = down.core(expert, down.inner(self.act_fn(h_gate) * h_up))
            weighted = y * weight_TK[token, place, None]
            sum_TS.index_add_(0, token, weighted.to(sum_TS.dtype))
        return down.outer(sum_TS)

    def active_parameters(self) -> int:
        """How many of its parameters one token uses."""
        return sum(one.active_parameters(self.top_k) for one in self.factors.values())


def _chosen(index_TK: Tensor, number: int) -> Iterator[int]:
    for expert in index_TK.unique().tolist():
        if 0 <= expert < number:
            yield expert


def factorized_in(module: nn.Module) -> FactorizedExperts | None:
    """The experts in factors among a block's own modules, where there are some."""
    found = [one for one in module.children() if isinstance(one, FactorizedExperts)]
    return found[0] if found else None


def idle_parameters(model: nn.Module) -> int:
    """Parameters of all experts in factors that one token does not use."""
    return sum(
        sum(parameter.numel() for parameter in one.parameters()) - one.active_parameters()
        for one in model.modules()
        if isinstance(one, FactorizedExperts)
    )


# ------------------------------------------------------------------ what there was


def obstacle_to_factors(layer: MoELayer) -> str | None:
    """Why a layer's experts cannot be computed from factors, in words; None where they can."""
    experts, kind = layer.experts, type(layer.experts).__name__
    if layer.info.real_experts or getattr(experts, "zero_experts", 0):
        return "its router has more rows than there are experts"
    if is_uneven(experts):
        return "its experts have different widths (method.widths=by_layer keeps them alike)"
    if isinstance(experts, AdaptedExperts) or scales_input(experts):
        return f"{kind} computes in a way of its own"
    if experts.has_bias:
        return f"{kind} has biases"
    plain = experts.has_gate and type(experts)._apply_gate is _default_apply_gate
    if not plain or not experts.is_concatenated or experts.has_post_expert_norm:
        return f"{kind} is no plain gated MLP, down(act(gate(x)) * up(x))"
    return None


def check_factorizable(layer: MoELayer) -> None:
    """Refuse experts that cannot be computed from factors."""
    if why := obstacle_to_factors(layer):
        raise UserError(
            f"layer {layer.info.index} cannot be factorised: {why}. Plain gated MLPs without "
            "biases can; prune such a model instead (method=prune)"
        )


def stacked(experts: Experts) -> dict[str, Tensor]:
    """The experts' gate, up and down projections [E, O, N] by name, views of their tensors."""
    both: Tensor = experts.gate_up_proj
    down: Tensor = experts.down_proj
    if experts.is_transposed:
        both, down = both.transpose(1, 2), down.transpose(1, 2)
    gate, up = both.chunk(2, dim=1)
    return {"gate": gate, "up": up, "down": down}


def matrix_shapes(layer: MoELayer) -> dict[str, StackShape]:
    """Their shapes (E, O, N)."""
    found = {name: tuple(tensor.shape) for name, tensor in stacked(layer.experts).items()}
    return {name: (shape[0], shape[1], shape[2]) for name, shape in found.items()}


# ------------------------------------------------------------------ put in their place


def put_factors(layer: MoELayer, specs: Mapping[str, Spec]) -> FactorizedExperts:
    """Put experts in factors, their values still to come, into the layer's block; they."""
    check_factorizable(layer)
    experts = layer.experts
    made = FactorizedExperts(
        matrix_shapes(layer), specs, experts.act_fn, layer.info.top_k, experts.down_proj.data
    )
    name = next(name for name, one in layer.block.named_children() if one is experts)
    setattr(layer.block, name, made)
    return made


def factor_name(index: int, matrix: str, factor: str) -> str:
    """What a plan calls a factor of one matrix of decoder layer `index` among its tensors."""
    return f"layers.{index}.factors.{matrix}.{factor}"


def written_factors(experts: FactorizedExperts) -> dict[str, Any]:
    """What config.json of our own form says of them."""
    number, size, width = experts.down_factors.shape
    specs = {name: _plain(one.spec) for name, one in experts.factors.items()}
    return {"num_experts": number, "hidden_size": size, "width": width} | specs


def _plain(spec: Spec) -> dict[str, Any]:
    return {key: list(one) if isinstance(one, tuple) else one for key, one in spec.items()}


def replayed(layer: MoELayer, written: Mapping[str, Any]) -> nn.Module:
    """The block with such experts, from a layer as its family builds it, without weights."""
    if written["num_experts"] < layer.info.num_experts:
        prune_layer(layer, range(written["num_experts"]))
    number, size, width = (written[name] for name in ("num_experts", "hidden_size", "width"))
    shapes = {"gate": (number, width, size), "up": (number, width, size)}
    shapes["down"] = (number, size, width)
    experts = layer.experts
    made = FactorizedExperts(
        shapes, {name: written[name] for name in GATE_UP_DOWN}, experts.act_fn, layer.info.top_k,
        experts.down_proj.data,
    )  # fmt: skip
    name = next(name for name, one in layer.block.named_children() if one is experts)
    setattr(layer.block, name, made)
    return layer.block


@torch.no_grad()
def fill_factors(experts: FactorizedExperts, given: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Give all factors their values, by matrix and name, in place."""
    for matrix, factors in experts.factors.items():
        for name, tensor in factors.state_dict(keep_vars=True).items():
            tensor.data.copy_(given[matrix][name])
