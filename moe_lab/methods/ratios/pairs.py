"""Experts and hidden units under one budget: for each layer how many experts, and how wide.

Each layer's error is measured at a few pairs of both numbers while all other layers are intact, and
interpolated between them; the pairs with the least sum of errors that fit the budget, in bytes, are
then found exactly. That errors of layers add up is an assumption. Letters: N numbers of experts, W
widths of one layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.interpolate import RegularGridInterpolator
from torch import Tensor

from moe_lab.methods.ratios.neurons import ranked_by_layer
from moe_lab.models.narrowing import Cut
from moe_lab.profile.hidden import digest_of
from moe_lab.types import LayerInfo

POINTS = (4, 6)  # how many numbers of experts, and widths, are tried below the whole layer
STEPS = 20_000  # of which the budget is made: a cost is rounded up to one
Shape = tuple[int, int]


@dataclass(frozen=True)
class LayerUnits:
    """A layer, the scores [E, I] of its hidden units, and the numbers among which is chosen.

    numbers: of experts, ascending; widths: of hidden units of each, ascending; both end with what
    the layer has, where that is a multiple that was asked for.
    """

    info: LayerInfo
    score_EI: Tensor
    numbers: Sequence[int]
    widths: Sequence[int]

    def experts(self, number: int) -> tuple[int, ...]:
        """The experts that stay: those whose hidden units have the largest sum of scores.

        Of routers that work on groups the same number of each.
        """
        score_GE = self.score_EI.double().sum(dim=1).view(self.info.groups, -1)
        order_GE = score_GE.argsort(dim=1, descending=True, stable=True)
        size, each = score_GE.shape[1], number // self.info.groups
        best = order_GE[:, :each] + torch.arange(len(order_GE))[:, None] * size
        return tuple(sorted(best.flatten().tolist()))

    def cut(self, pair: Shape) -> Cut:
        """What stays of the layer: of every expert its hidden units with the highest scores."""
        number, width = pair
        pool, _ = ranked_by_layer(self.info, self.score_EI)
        return Cut(self.experts(number), pool.kept(width))

    def cost(self, pair: Shape) -> int:
        """Bytes of so many experts of this width, each with its router row."""
        number, width = pair
        row = self.info.expert_bytes - self.info.expert_width * self.info.neuron_bytes
        return number * (row + width * self.info.neuron_bytes)

    @property
    def whole(self) -> Shape:
        """The layer as it is."""
        return self.info.num_experts, self.info.expert_width

    def tried(self) -> tuple[list[int], list[int]]:
        """The numbers and widths at which its error is measured, ascending."""
        (numbers, widths), (most, width) = POINTS, self.whole
        return _thinned(self.numbers, numbers, most), _thinned(self.widths, widths, width)

    def known_by(self) -> dict[str, Any]:
        """What its error at a pair depends on beside the model and the text."""
        order_EI = self.score_EI.argsort(dim=1, descending=True, stable=True)
        expert_E = self.score_EI.double().sum(dim=1).argsort(descending=True, stable=True)
        return {"layer": self.info.index, "order": digest_of(order_EI, expert_E)}


class Pairs(dict[int, Shape]):
    """The pair of each layer, by its index; found: what a search tells of them."""

    def __init__(self, pairs: Mapping[int, Shape], found: dict[str, Any]):
        super().__init__(pairs)
        self.found = found


def _thinned(some: Sequence[int], count: int, most: int) -> list[int]:
    """About so many of these numbers, the first and the last among them, and `most`."""
    stride = max(1, math.ceil((len(some) - 1) / count))
    places = range(len(some) - 1, -1, -stride)
    return sorted({some[place] for place in places} | {some[0], most})


def least_error(
    layers: Sequence[LayerUnits], errors: Mapping[int, Mapping[Shape, float]], budget: int
) -> tuple[dict[int, Shape], float]:
    """The pair of each layer with the least sum of errors whose costs fit the budget, and the sum.

    errors: by layer index, at each pair of `tried`. Exact over all pairs, by dynamic programming
    over the layers and the budget in STEPS steps, to which costs are rounded up.
    """
    step = max(1, math.ceil(budget / STEPS))
    room = budget // step
    best = np.zeros(room + 1)
    taken: list[np.ndarray] = []
    tables = [_table(layer, errors[layer.info.index], step, room) for layer in layers]
    for cost, error, _ in tables:
        now, choice = np.full(room + 1, np.inf), np.zeros(room + 1, dtype=np.int64)
        for place, (price, lost) in enumerate(zip(cost, error, strict=True)):
            value = best[: room + 1 - price] + lost
            better = value < now[price:]
            now[price:][better] = value[better]
            choice[price:][better] = place
        taken.append(choice)
        best = now
    chosen, left = {}, room
    for layer, (cost, _, pairs), choice in zip(
        layers[::-1], tables[::-1], taken[::-1], strict=True
    ):
        place = int(choice[left])
        chosen[layer.info.index] = pairs[place]
        left -= int(cost[place])
    return {layer.info.index: chosen[layer.info.index] for layer in layers}, float(best[room])


def _table(
    layer: LayerUnits, errors: Mapping[Shape, float], step: int, room: int
) -> tuple[np.ndarray, np.ndarray, list[Shape]]:
    """The pairs that could be best: costs in steps and errors, those beaten by cheaper ones out."""
    numbers, widths = layer.tried()
    grid = np.array([[errors[number, width] for width in widths] for number in numbers])
    every = [(number, width) for number in layer.numbers for width in layer.widths]
    every += [layer.whole] if layer.whole not in every else []
    error = _interpolated(numbers, widths, grid, np.array(every, dtype=float))
    cost = np.array([-(-layer.cost(pair) // step) for pair in every])
    order = [place for place in np.lexsort((error, cost)) if cost[place] <= room]
    least, kept = np.inf, []
    for place in order:
        if error[place] < least:
            least = error[place]
            kept.append(place)
    return cost[kept], error[kept], [every[place] for place in kept]


def _interpolated(
    numbers: Sequence[int], widths: Sequence[int], grid: np.ndarray, points: np.ndarray
) -> np.ndarray:
    """Between the measured ones, straight in each number."""
    axes = [np.array(some, dtype=float) for some in (numbers, widths)]
    for axis, some in enumerate(axes):
        if len(some) == 1:  # nothing to interpolate along
            axes[axis], grid = np.array([some[0] - 1, some[0]]), grid.repeat(2, axis=axis)
    made: np.ndarray = RegularGridInterpolator(axes, grid)(points)
    return made
