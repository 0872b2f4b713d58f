"""What is read off an MoE layer's weights: no text enters it."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.moe import MoELayer, expert_parameters
from moe_lab.stand_ins import by_row
from moe_lab.types import UserError


def constants(layer: MoELayer) -> dict[str, Tensor]:
    """All of it by name, in float64; the layer's weights are in memory."""
    return {"router_norm": router_norm(layer), **weight_sums(layer)}


def router_norm(layer: MoELayer) -> Tensor:
    """l2 norm [E] of each expert's row of the router's weight."""
    num_experts = layer.info.num_experts
    for weight in layer.router.parameters():
        if weight.dim() == 2 and num_experts in weight.shape:
            rows_ED = weight.detach().movedim(weight.shape.index(num_experts), 0)
            return torch.linalg.vector_norm(rows_ED.double(), dim=1).cpu()
    raise UserError(f"{type(layer.router).__name__} has no weight with a row for each expert")


@torch.no_grad()
def weight_sums(layer: MoELayer) -> dict[str, Tensor]:
    """Over all weights of an expert's projections, without biases; by name, in float64.

    weight_abs_sum and weight_square_sum [E], of their absolute values and squares; weight_count
    [1], how many one expert has. A matrix at a time, so that no copy of all experts is made.
    """
    experts = [(row["up"], row["down"]) for row in expert_parameters(layer.experts)]

    def summed(order: int) -> Tensor:
        norm_E2 = torch.stack(
            [
                torch.stack(
                    [torch.linalg.vector_norm(w, ord=order, dtype=torch.float64) for w in row]
                )
                for row in experts
            ]
        )
        return by_row(layer.experts, (norm_E2**order).sum(dim=1)).cpu()

    count = float(sum(weight.numel() for weight in experts[0]))
    return {
        "weight_abs_sum": summed(1),
        "weight_square_sum": summed(2),
        "weight_count": torch.tensor([count], dtype=torch.float64),
    }
