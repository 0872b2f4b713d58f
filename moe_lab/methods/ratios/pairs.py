"""Experts, hidden units and bits under one budget: for each layer how many, how wide, how fine.

Each layer's error is measured at a few pairs of both numbers (in each number of bits, where these
are chosen, too) while all other layers are intact, and interpolated between pairs; those with the
least sum of errors that fit the budget, in bytes, are then found exactly. That errors of layers add
up is an assumption. Letters: N numbers of experts, W widths of one layer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.interpolate import RegularGridInterpolator
from torch import Tensor

from moe_lab import knapsack
from moe_lab.methods.ratios.bits import UNROUNDED, Bits
from moe_lab.methods.ratios.neurons import ranked_by_layer
from moe_lab.models.narrowing import Cut
from moe_lab.profile.hidden import digest_of
from moe_lab.types import LayerInfo

POINTS = (4, 6)  # how many numbers of experts, and widths, are tried below the whole layer
Shape = tuple[int, ...]  # experts, their width, and where bits are chosen these


@dataclass(frozen=True)
class LayerUnits:
    """A layer, the scores [E, I] of its hidden units, and the numbers among which is chosen.

    numbers: of experts, ascending; widths: of hidden units of each, ascending; both end with what
    the layer has, where that is a multiple that was asked for. bits: None where all stays as it is
    stored.
    """

    info: LayerInfo
    score_EI: Tensor
    numbers: Sequence[int]
    widths: Sequence[int]
    bits: Bits | None = None

    def experts(self, number: int) -> tuple[int, ...]:
        """The experts that stay: those whose hidden units have the largest sum of scores.

        Of routers that work on groups the same number of each.
        """
        score_GE = self.score_EI.double().sum(dim=1).view(self.info.groups, -1)
        order_GE = score_GE.argsort(dim=1, descending=True, stable=True)
        size, each = score_GE.shape[1], number // self.info.groups
        best = order_GE[:, :each] + torch.arange(len(order_GE))[:, None] * size
        return tuple(sorted(best.flatten().tolist()))

    def cut(self, shape: Shape) -> Cut:
        """What stays of the layer: of every expert its hidden units with the highest scores."""
        number, width, *bits = shape
        pool, _ = ranked_by_layer(self.info, self.score_EI)
        scheme = self.bits.scheme(bits[0]) if self.bits else None
        return Cut(self.experts(number), pool.kept(width), scheme)

    def cost(self, shape: Shape) -> int:
        """Bytes of so many experts of this width, each with its router row."""
        number, width, *bits = shape
        used = self.bits or Bits()
        return number * used.expert_bytes(self.info, width, bits[0] if bits else UNROUNDED)

    @property
    def whole(self) -> Shape:
        """The layer as it is."""
        pair = self.info.num_experts, self.info.expert_width
        return (*pair, UNROUNDED) if self.bits else pair

    def tried(self) -> tuple[list[int], list[int]]:
        """The numbers and widths at which its error is measured, ascending."""
        numbers, widths = POINTS
        return (
            _thinned(self.numbers, numbers, self.info.num_experts),
            _thinned(self.widths, widths, self.info.expert_width),
        )

    def shapes(self, numbers: Sequence[int], widths: Sequence[int]) -> list[Shape]:
        """All combinations of these, in each number of bits whose groups divide the width."""
        pairs: list[Shape] = list(itertools.product(numbers, widths))
        if self.bits is None:
            return pairs
        chosen = self.bits
        return [
            (*pair, bits)
            for bits in chosen.values
            for pair in pairs
            if chosen.fits(self.info, pair[1], bits)
        ]

    @property
    def measured(self) -> list[Shape]:
        """Where its error is measured: not where it is whole."""
        return [shape for shape in self.shapes(*self.tried()) if shape != self.whole]

    @property
    def least(self) -> int:
        """Bytes of the smallest that it may become."""
        return min(map(self.cost, self.shapes(self.numbers, self.widths)))

    def known_by(self) -> dict[str, Any]:
        """What its error at a pair depends on beside the model and the text."""
        order_EI = self.score_EI.argsort(dim=1, descending=True, stable=True)
        expert_E = self.score_EI.double().sum(dim=1).argsort(descending=True, stable=True)
        known = {"layer": self.info.index, "order": digest_of(order_EI, expert_E)}
        return known | ({"group_size": self.bits.group_size} if self.bits else {})


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
    """The shape of each layer with the least sum of errors whose costs fit the budget, and the sum.

    errors: by layer index, at each of `measured` and at the whole. Exact over all shapes.
    """
    tables = [_table(layer, errors[layer.info.index]) for layer in layers]
    places = knapsack.best_choices([[(c, e) for c, e, _ in table] for table in tables], budget)
    taken = [table[place] for table, place in zip(tables, places, strict=True)]
    chosen = {layer.info.index: shape for layer, (_, _, shape) in zip(layers, taken, strict=True)}
    return chosen, sum(error for _, error, _ in taken)


def _table(layer: LayerUnits, errors: Mapping[Shape, float]) -> list[tuple[int, float, Shape]]:
    """Cost and error of every shape that the layer may have."""
    found: dict[Shape, float] = {}
    for bits in layer.bits.values if layer.bits else (None,):
        found |= _between(layer, errors, () if bits is None else (bits,))
    if layer.bits is None or UNROUNDED in layer.bits.values:
        found[layer.whole] = 0.0
    return [(layer.cost(shape), error, shape) for shape, error in found.items()]


def _between(layer: LayerUnits, errors: Mapping[Shape, float], bits: Shape) -> dict[Shape, float]:
    """The error of every pair in so many bits, between the measured ones by interpolation."""
    numbers, widths = layer.tried()

    def there(width: int) -> bool:
        return layer.bits is None or layer.bits.fits(layer.info, width, bits[0])

    widths, every = list(filter(there, widths)), list(filter(there, layer.widths))
    pairs = list(itertools.product(layer.numbers, every))
    if not pairs:
        return {}
    grid = np.array([[errors[number, width, *bits] for width in widths] for number in numbers])
    error = _interpolated(numbers, widths, grid, np.array(pairs, dtype=float))
    return {(*pair, *bits): float(lost) for pair, lost in zip(pairs, error, strict=True)}


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
