"""Experts cut into segments, each of which joins an expert that has one like it (DERN).

A segment is a hidden unit: its row of the gate and of the up projection, with their biases, and its
column of the down projection. Letters: E experts, I segments of each, P of one expert and all that
join it, F numbers in a part of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_lab.models.experts import Experts
from moe_lab.models.hidden_units import HiddenUnits

ROUNDS = 50  # of k-means, which ends where nothing changes
ROWS_AT_ONCE = 4096  # whose similarities to all others are computed at a time
Segments = Mapping[str, Tensor]  # by the name of the tensor that they stand in, [*, F]


@torch.no_grad()
def recombine(
    experts: Experts, kept: Sequence[int], weight_E: Sequence[float], threshold: float
) -> list[int]:
    """Let the segments of the experts that go join those that stay, in place; how many joined each.

    DERN (2509.10377): a segment of a dropped expert goes to the expert with the most similar one,
    by the cosine of up row and down column taken together, where that is above the threshold; the
    others are lost. An expert that was joined then becomes I segments again: weighted spherical
    k-means over all that it has, which begins with those of the largest gate row (a segment weighs
    what its expert weighs; experts are weighed by `weight_E`, not below 0), and each cluster's
    weighted mean. An expert that nothing joined stays as it is.
    """
    units = HiddenUnits(experts)
    gone = [expert for expert in range(len(experts.down_proj)) if expert not in kept]
    of_gone = [units.parts(expert) for expert in gone]
    place_GI = _nearest(units, kept, of_gone, threshold)
    joined = []
    for place, target in enumerate(kept):
        taken = [(one, to_I == place) for one, to_I in zip(of_gone, place_GI, strict=True)]
        number = sum(int(mask_I.sum()) for _, mask_I in taken)
        joined.append(number)
        if number == 0:
            continue
        own = units.parts(target)
        pool = {
            name: torch.cat([part, *(one[name][mask_I] for one, mask_I in taken)])
            for name, part in own.items()
        }
        sources = [(target, units.width), *(
            (expert, int(mask_I.sum())) for expert, (_, mask_I) in zip(gone, taken, strict=True)
        )]  # fmt: skip
        weights = [max(0.0, float(weight_E[e])) for e, size in sources for _ in range(size)]
        weight_P = torch.tensor(weights, dtype=torch.float64, device=experts.down_proj.device)
        _put(units, target, clustered(units, pool, weight_P))
    return joined


def _nearest(
    units: HiddenUnits, kept: Sequence[int], of_gone: Sequence[Segments], threshold: float
) -> list[Tensor]:
    """For each segment of the experts that go, the place in `kept` where it goes; -1: nowhere."""
    best = [
        torch.full((units.width,), -torch.inf, device=units.experts.down_proj.device)
        for _ in of_gone
    ]
    places = [torch.full_like(one, -1, dtype=torch.long) for one in best]
    for place, target in enumerate(kept):
        own_IF = _up_and_down(units, units.parts(target))
        for one, best_I, place_I in zip(of_gone, best, places, strict=True):
            alike_I, _ = _most_similar(_up_and_down(units, one), own_IF)
            better_I = (alike_I > best_I) & (alike_I > threshold)
            best_I[better_I] = alike_I[better_I]
            place_I[better_I] = place
    return places


def _up_and_down(units: HiddenUnits, parts: Segments) -> Tensor:
    """Up row and down column of each segment side by side, of length 1 together."""
    return F.normalize(torch.cat([_rows(units, parts)[-1], parts[units.down]], dim=1), dim=1)


def _rows(units: HiddenUnits, parts: Segments) -> tuple[Tensor, ...]:
    """The gate row, where there is one, and the up row of each segment."""
    names = [name for name in parts if name != units.down and not name.endswith("_bias")]
    rows_IF = torch.cat([parts[name] for name in names], dim=1)
    return rows_IF.chunk(2, dim=1) if units.experts.has_gate else (rows_IF,)


def _most_similar(one_PF: Tensor, other_QF: Tensor) -> tuple[Tensor, Tensor]:
    """The largest inner product of each row with any of the others, and with which; ties: lower."""
    found = [(part @ other_QF.T).max(dim=1) for part in one_PF.split(ROWS_AT_ONCE)]
    return torch.cat([one.values for one in found]), torch.cat([one.indices for one in found])


def clustered(units: HiddenUnits, pool: Segments, weight_P: Tensor) -> dict[str, Tensor]:
    """As many segments as an expert has, of all in the pool; in the order of those it begins with.

    A cluster that has no weight stays the segment that it began with.
    """
    gate_PF = _rows(units, pool)[0]
    largest = gate_PF.norm(dim=1).sort(descending=True, stable=True).indices[: units.width]
    seeds = largest.sort().values
    whole_PF = F.normalize(torch.cat(list(pool.values()), dim=1).double(), dim=1)
    centre_IF, cluster_P = whole_PF[seeds], None
    for _ in range(ROUNDS):
        _, nearest_P = _most_similar(whole_PF, centre_IF)
        if cluster_P is not None and torch.equal(nearest_P, cluster_P):
            break
        cluster_P = nearest_P
        sums_IF = _summed(whole_PF, weight_P, cluster_P, len(seeds))
        some_I = sums_IF.norm(dim=1) > 0
        centre_IF = torch.where(some_I[:, None], F.normalize(sums_IF, dim=1), centre_IF)
    assert cluster_P is not None
    total_I = torch.zeros_like(centre_IF[:, 0]).index_add_(0, cluster_P, weight_P)
    made = {}
    for name, part in pool.items():
        mean_IF = _summed(part.double(), weight_P, cluster_P, len(seeds)) / total_I[:, None]
        made[name] = torch.where(total_I[:, None] > 0, mean_IF, part[seeds].double())
    return made


def _summed(value_PF: Tensor, weight_P: Tensor, cluster_P: Tensor, number: int) -> Tensor:
    zeros = value_PF.new_zeros(number, value_PF.shape[1])
    return zeros.index_add_(0, cluster_P, value_PF * weight_P[:, None])


def _put(units: HiddenUnits, expert: int, parts: Segments) -> None:
    """Give an expert these segments."""
    for name, (axis, place_IN) in units.places.items():
        rows = units.tensors[name][expert].movedim(axis, 0)
        values = parts[name].reshape(place_IN.numel(), *rows.shape[1:])
        rows[place_IN.flatten().to(rows.device)] = values.to(rows.dtype)
