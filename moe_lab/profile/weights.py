"""What is read off an MoE layer's weights: no text enters it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moe_lab.finite import check_experts
from moe_lab.models.hidden_units import HiddenUnits
from moe_lab.models.layers import MoELayer, by_expert, has_hidden_units
from moe_lab.models.remapped import by_row
from moe_lab.profile.layer import OF_NEURONS, SHARED
from moe_lab.types import UserError

FEW = 8  # experts at a time: no copy of all of them is made


def weight_statistics(layer: MoELayer) -> dict[str, Tensor]:
    """All of it by name, in float64; the layer's weights are in memory.

    NotFinite where a vector of the router or the experts, which no sum tells of, is not finite.
    """
    check_vectors(layer)
    return {"router_norm": router_row_norms(layer), **weight_sums(layer)}


@torch.no_grad()
def neuron_statistics(layer: MoELayer) -> dict[str, Tensor]:
    """What is read off the weights of each hidden unit, by name, in float64.

    down_abs_sum and down_square_sum [E, I], of the absolute values and squares in its column of the
    down projection; neuron_square_sum [E, I], of the squares of all its weights. The same of the
    shared experts [1, I] with "shared_" before the names, where they are a plain or gated MLP.
    """
    units = HiddenUnits(layer.experts)
    found = [_of_each(list(units.parts(e).values()), c) for e, c in enumerate(units.down_columns())]
    sums = dict(zip(OF_NEURONS, map(torch.stack, zip(*found, strict=True)), strict=True))
    if layer.shared is None or not has_hidden_units(layer.shared):
        return sums
    weights = {n: m.weight for n, m in layer.shared.named_children() if isinstance(m, nn.Linear)}
    column_ID = weights.pop("down_proj").T
    shared = _of_each([*weights.values(), column_ID], column_ID)
    return sums | {SHARED + n: value[None] for n, value in zip(OF_NEURONS, shared, strict=True)}


def _of_each(parts: Sequence[Tensor], column_ID: Tensor) -> tuple[Tensor, ...]:
    """OF_NEURONS of one expert, [I] each; parts: all weights of each hidden unit [I, F]."""
    exact = torch.promote_types(column_ID.dtype, torch.float32)
    every = torch.stack([part.to(exact).square().sum(dim=1).double() for part in parts])
    column_ID = column_ID.to(exact)
    sums = column_ID.abs().sum(dim=1), column_ID.square().sum(dim=1), every.sum(dim=0)
    return tuple(one.double().cpu() for one in sums)


def check_vectors(layer: MoELayer) -> None:
    """Refuse biases and factors by expert that are NaN or infinite: a router's bias alone decides.

    A bias of -inf is one that masks its expert.
    """
    inside = set(layer.experts.modules())
    for module, name, tensor, dimension in by_expert(layer):
        dimensions = sum(size > 1 for size in tensor.shape) - int(module in inside)
        if tensor.is_floating_point() and dimensions <= 1:
            rows = tensor.detach().movedim(dimension, 0)
            masked = rows.masked_fill(rows == -torch.inf, 0.0)
            check_experts(masked, f"its part of {name}", layer.info.index)


def router_row_norms(layer: MoELayer) -> Tensor:
    """l2 norm [E] of each expert's row of the router's weight."""
    own = set(layer.router.modules())
    for module, _, weight, dimension in by_expert(layer):
        if module in own and weight.dim() == 2 and weight.is_floating_point():
            rows_ED = weight.detach().movedim(dimension, 0)[: layer.info.num_experts]
            norm_E: Tensor = torch.linalg.vector_norm(rows_ED.double(), dim=1)
            return norm_E.cpu()
    raise UserError(f"{type(layer.router).__name__} has no weight with a row for each expert")


@torch.no_grad()
def weight_sums(layer: MoELayer) -> dict[str, Tensor]:
    """Over all weights of an expert's projections, without biases; by name, in float64.

    weight_abs_sum and weight_square_sum [E], of their absolute values and squares; weight_count
    [1], how many one expert has. Rows of a matrix are added up in float32 at least.
    """
    absolute_E = square_E = torch.zeros((), dtype=torch.float64)
    count = 0
    experts = layer.experts
    up = experts.gate_up_proj[: len(experts.down_proj)] if experts.has_gate else experts.up_proj
    for matrices in (up, experts.down_proj):
        exact = torch.promote_types(matrices.dtype, torch.float32)
        parts = matrices.split(FEW)
        rows = torch.cat([part.abs().sum(dim=2, dtype=exact) for part in parts])
        absolute_E = absolute_E + rows.sum(dim=1, dtype=torch.float64)
        rows = torch.cat([torch.linalg.vector_norm(part, dim=2, dtype=exact) for part in parts])
        square_E = square_E + rows.double().square().sum(dim=1)
        count += matrices[0].numel()
    return {
        "weight_abs_sum": by_row(layer.experts, absolute_E).cpu(),
        "weight_square_sum": by_row(layer.experts, square_E).cpu(),
        "weight_count": torch.tensor([float(count)], dtype=torch.float64),
    }
