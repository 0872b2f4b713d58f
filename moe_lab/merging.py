"""Several experts of one layer averaged into one, their hidden units matched first.

Averaging weights is meaningful only between units that do the same work: two experts can compute
the same function with their hidden units in another order. Letters: E experts, I hidden units.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn


@torch.no_grad()
def merge_experts(
    experts: nn.Module,
    kept: Sequence[int],
    groups: Sequence[Sequence[int]],
    weights: Sequence[Sequence[float]],
    align: bool,
) -> None:
    """Make kept[i] the average of the experts groups[i] with weights[i] (sum 1), in place.

    M-SMoE (2310.01334): with `align` the hidden units of each member are first permuted to match
    those of kept[i], which leaves the member's function as it is. Computed in float64.
    """
    places = _unit_places(experts)
    tensors = {
        name: tensor
        for name, tensor in experts.named_parameters()
        if tensor.shape[0] == experts.down_proj.shape[0]
    }
    for target, members, shares in zip(kept, groups, weights, strict=True):
        total = {
            name: torch.zeros_like(t[target], dtype=torch.float64) for name, t in tensors.items()
        }
        for member, share in zip(members, shares, strict=True):
            order_I = None
            if align and member != target:
                order_I = matching(_units(tensors, places, target), _units(tensors, places, member))
            for name, tensor in tensors.items():
                part = tensor[member].double()
                if order_I is not None and name in places:
                    part = _permuted(part, *places[name], order_I)
                total[name] += share * part
        for name, tensor in tensors.items():
            tensor[target] = total[name].to(tensor.dtype)


def matching(target_IF: Tensor, member_IF: Tensor) -> Tensor:
    """For each unit of the target the member's unit that takes its place, [I].

    The assignment with the largest sum of inner products of the units' weights.
    """
    similarity_II = target_IF @ member_IF.T
    _, column_I = linear_sum_assignment(similarity_II.cpu().numpy(), maximize=True)
    return torch.from_numpy(column_I).to(target_IF.device)


def _unit_places(experts: nn.Module) -> dict[str, tuple[int, Tensor]]:
    """Where the hidden units lie in one expert's tensors: the axis, and each unit's places [I, n].

    n is 2 where one tensor holds both the gate and the up projection, one after the other or
    interleaved.
    """
    row, column = (1, 0) if experts.is_transposed else (0, 1)
    width = experts.down_proj.shape[1:][column]
    unit_I1 = torch.arange(width, device=experts.down_proj.device)[:, None]
    up, into = "up_proj", unit_I1
    if experts.has_gate:
        up, half = "gate_up_proj", torch.arange(2, device=unit_I1.device)
        into = unit_I1 + half * width if experts.is_concatenated else unit_I1 * 2 + half
    places = {up: (row, into), "down_proj": (column, unit_I1)}
    return places | ({f"{up}_bias": (0, into)} if experts.has_bias else {})


def _units(tensors: dict[str, Tensor], places: dict[str, tuple], expert: int) -> Tensor:
    """All weights of each hidden unit, [I, F], in float32 or better."""
    parts = []
    for name, (axis, place_In) in places.items():
        rows = tensors[name][expert].movedim(axis, 0)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        parts.append(rows[place_In.flatten()].reshape(len(place_In), -1))
    return torch.cat(parts, dim=1)


def _permuted(part: Tensor, axis: int, place_In: Tensor, order_I: Tensor) -> Tensor:
    source = part.index_select(axis, place_In[order_I].flatten())
    return torch.empty_like(part).index_copy_(axis, place_In.flatten(), source)
