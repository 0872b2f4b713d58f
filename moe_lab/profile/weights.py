"""What is read off an MoE layer's weights: no text enters it."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.finite import check_experts
from moe_lab.models.layers import MoELayer, by_expert
from moe_lab.models.remapped import by_row
from moe_lab.types import UserError

FEW = 8  # experts at a time: no copy of all of them is made


def weight_statistics(layer: MoELayer) -> dict[str, Tensor]:
    """All of it by name, in float64; the layer's weights are in memory.

    NotFinite where a vector of the router or the experts, which no sum tells of, is not finite.
    """
    check_vectors(layer)
    return {"router_norm": router_row_norms(layer), **weight_sums(layer)}


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
