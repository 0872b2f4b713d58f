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

from moe_lab.models.adapters.base import AdaptedExperts
from moe_lab.models.experts import Experts
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
    units = HiddenUnits(experts)
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


class HiddenUnits:
    """The hidden units of the experts of one layer, whatever the layout of their tensors.

    tensors: by name, those with a row for each expert; places: by name, in which axis of one
    expert's tensor its hidden units lie, and the places [I, n] of each. n is 2 where one tensor
    holds both the gate and the up projection, one after the other or interleaved.
    """

    def __init__(self, experts: Experts):
        num_experts, row, column = len(experts.down_proj), 0, 1
        if experts.is_transposed:
            row, column = column, row
        self.tensors: dict[str, Tensor] = {
            name: tensor
            for name, tensor in experts.named_parameters()
            if tensor.shape[0] == num_experts
        }
        if isinstance(experts, AdaptedExperts):
            self.tensors = experts.matrices()
        width = experts.down_proj.shape[1:][column]
        unit_I1 = torch.arange(width, device=experts.down_proj.device)[:, None]
        up, into = "up_proj", unit_I1
        if experts.has_gate:
            up, half = "gate_up_proj", torch.arange(2, device=unit_I1.device)
            into = unit_I1 + half * width if experts.is_concatenated else unit_I1 * 2 + half
        self.places = {up: (row, into), "down_proj": (column, unit_I1)}
        if up not in self.tensors:  # gate, up and down projection apart, all [E, I, D]
            self.places = dict.fromkeys(self.tensors, (0, unit_I1))
        self.places |= {f"{up}_bias": (0, into)} if experts.has_bias else {}

    def weights(self, expert: int) -> Tensor:
        """All weights of each hidden unit of an expert, [I, F], in float32 or better."""
        parts = []
        for name, (axis, place_In) in self.places.items():
            rows = self.tensors[name][expert].movedim(axis, 0)
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            parts.append(rows[place_In.flatten()].reshape(len(place_In), -1))
        return torch.cat(parts, dim=1)

    def expert(self, expert: int, order_I: Tensor | None = None) -> dict[str, Tensor]:
        """An expert's tensors by name, unit order_I[i] in the place of unit i."""
        parts = {name: tensor[expert] for name, tensor in self.tensors.items()}
        for name, (axis, place_In) in self.places.items() if order_I is not None else ():
            source = parts[name].index_select(axis, place_In[order_I].flatten())
            parts[name] = torch.empty_like(source).index_copy_(axis, place_In.flatten(), source)
        return parts
