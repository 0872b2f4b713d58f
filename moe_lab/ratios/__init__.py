"""Pruning ratios: how many experts stay, per layer.

A ratio has `check(layers)`, which refuses an impossible request before any work, and
`numbers(scores, evidence)`, how many experts each layer keeps, by layer index. It may have
`notes(scores, numbers)`, facts about its decision for the plan; `identity(options)`, what of its
options the numbers depend on; and `code()`, the modules that decide them beside itself. `scores`
are one score for each expert, by some metric of the intact model: which experts stay is their
order (`best`).

Routers that work on groups keep the same number in each, so that what stays or goes is a unit: one
expert of each group, the r-th best of each together. Elsewhere a unit is one expert.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from moe_lab.moe import check_kept
from moe_lab.types import LayerInfo, UserError

Scores = Sequence[tuple[LayerInfo, Tensor]]


def check_share(ratio: float) -> None:
    """Refuse a share of experts to remove that is not in [0, 1)."""
    if not 0 <= ratio < 1:
        raise UserError(f"ratio.ratio={ratio}: the share of experts removed is at least 0, below 1")


def units(info: LayerInfo, score_E: Tensor) -> list[tuple[int, ...]]:
    """The experts of a layer in units, best first; ties put the lower expert first."""
    size = info.num_experts // info.groups
    order = score_E.view(info.groups, size).argsort(dim=1, descending=True, stable=True).tolist()
    by_group = [[group * size + expert for expert in row] for group, row in enumerate(order)]
    return list(zip(*by_group, strict=True))


def best(info: LayerInfo, score_E: Tensor, num_kept: int) -> tuple[int, ...]:
    """The experts of the best units that hold `num_kept` together, in ascending order."""
    chosen = units(info, score_E)[: num_kept // info.groups]
    return tuple(sorted(expert for unit in chosen for expert in unit))


def kept(scores: Scores, numbers: Mapping[int, int]) -> dict[int, tuple[int, ...]]:
    """The best `numbers[index]` experts of each layer, in ascending order, by layer index."""
    return {info.index: best(info, score, numbers[info.index]) for info, score in scores}


def floor_of(info: LayerInfo, floor: int | None) -> int:
    """The fewest experts that the layer keeps: `floor`, or as few as its router can work with.

    Raises UserError for a floor above the layer's experts, or one that its router cannot work with.
    """
    if floor is None:
        per_group = math.ceil(info.top_k / info.groups_used)
        return info.top_k if info.groups == 1 else info.groups * max(2, per_group)
    if floor > info.num_experts:
        raise UserError(
            f"ratio.floor={floor}: layer {info.index} has only {info.num_experts} experts"
        )
    try:
        check_kept(info, floor)
    except UserError as error:
        raise UserError(
            f"ratio.floor={floor} is too low or uneven: {error}. ratio.floor=null keeps at least "
            "what each router needs"
        ) from error
    return floor
