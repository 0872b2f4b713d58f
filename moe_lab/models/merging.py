"""Several experts of one layer averaged into one, their hidden units matched first.

Averaging weights is meaningful only between units that do the same work: two experts can compute
the same function with their hidden units in another order. Letters: E experts, I hidden units.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moe_lab.models.experts import Experts
from moe_lab.models.hidden_units import HiddenUnits
from moe_lab.models.widths import set_widths, widths_of
from moe_lab.types import AlignName


@torch.no_grad()
def merge_experts(
    experts: Experts,
    kept: Sequence[int],
    groups: Sequence[Sequence[int]],
    weights: Sequence[Sequence[float]],
    align: AlignName,
    permutation_EI: Tensor | None = None,
) -> None:
    """Make kept[i] the average of the experts groups[i] with weights[i] (sum 1), in place.

    Unless `align` is none the hidden units of each member are first permuted to match those of
    kept[i], which leaves the member's function as it is: with `weights` as `matching` finds them
    (M-SMoE, 2310.01334), else as permutation_EI says, in whose row e stands for each unit of
    kept[i] the unit of member e that takes its place. Computed in float64.
    """
    units, widths = HiddenUnits(experts), list(widths_of(experts))
    for target, members, shares in zip(kept, groups, weights, strict=True):
        total = {
            name: torch.zeros_like(tensor[target], dtype=torch.float64)
            for name, tensor in units.tensors.items()
        }
        for member, share in zip(members, shares, strict=True):
            order_I = None
            if member != target and align == "weights":
                order_I = matching(units.weights(target), units.weights(member))
            elif member != target and align != "none":
                order_I = cast(Tensor, permutation_EI)[member].to(experts.down_proj.device)
            for name, part in units.expert(member, order_I).items():
                total[name] += share * part.double()
        for name, tensor in units.tensors.items():
            tensor[target] = total[name].to(tensor.dtype)
        if len(members) > 1:  # whose units may stand anywhere
            widths[target] = units.width
    set_widths(experts, widths)


def permutation_name(index: int) -> str:
    """What a plan calls the permutation [E, I] of decoder layer `index` among its tensors."""
    return f"layers.{index}.permutation"


def matching(target_IF: Tensor, member_IF: Tensor) -> Tensor:
    """For each unit of the target the member's unit that takes its place, [I].

    The assignment with the largest sum of inner products of the units' weights.
    """
    similarity_II = target_IF @ member_IF.T
    _, column_I = linear_sum_assignment(similarity_II.cpu().numpy(), maximize=True)
    return torch.from_numpy(column_I).to(target_IF.device)
