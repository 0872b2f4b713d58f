"""Schemes of matrices by measured errors: the least sum of these under one budget.

A unit is what has one number of bits: a layer, or an expert of one.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_lab import knapsack
from moe_lab.models.matrices import WeightMatrix
from moe_lab.models.packing import packed_layout
from moe_lab.models.rounding import Levels, Scheme
from moe_lab.models.weight_files import size_in_bytes
from moe_lab.quantize.base import Quantizing
from moe_lab.types import UserError

logger = logging.getLogger(__name__)
_GIB = 2**30
Sharing = tuple[int, int | None]  # a layer, and its expert; None: all of them
Curves = Mapping[int, Sequence[Sequence[float]]]  # by layer: [experts or 1][schemes]


class LevelsBudget:
    """What may be spent on some matrices, and what one takes in each scheme."""

    def __init__(self, matrices: Sequence[WeightMatrix], schemes: Sequence[Scheme]):
        self.matrices, self.schemes = matrices, schemes

    room: int

    def cost(self, one: WeightMatrix, scheme: Scheme) -> int:
        """What a matrix takes of it."""
        raise NotImplementedError

    def refusal(self, least: int) -> str:
        """Why there is no room for the fewest bits, in words."""
        raise NotImplementedError

    def check(self) -> None:
        """Refuse, with a UserError, what not even the fewest bits fit into."""
        least = sum(self.cost(one, self.schemes[0]) for one in self.matrices)
        if least > self.room:
            raise UserError(self.refusal(least))


class BitsBudget(LevelsBudget):
    """A mean number of bits of all weights, without scales; costs are bits."""

    def __init__(self, matrices: Sequence[WeightMatrix], schemes: Sequence[Scheme], average: float):
        super().__init__(matrices, schemes)
        self.average = average
        self.room = math.floor(average * sum(one.num_weights for one in matrices))

    def cost(self, one: WeightMatrix, scheme: Scheme) -> int:
        """Bits of its weights."""
        return scheme.bits * one.num_weights

    def refusal(self, least: int) -> str:
        """The fewest bits there are."""
        few = self.schemes[0].bits
        return f"quantize.average_bits={self.average:g}: the fewest of quantize.bits are {few}"


class SizeBudget(LevelsBudget):
    """The GiB of the whole checkpoint, of which other tensors take what they take.

    The headers of its files, some hundred bytes a matrix, are not counted.
    """

    def __init__(
        self, matrices: Sequence[WeightMatrix], schemes: Sequence[Scheme], target_gib: float
    ):
        super().__init__(matrices, schemes)
        self.target_gib = target_gib
        self.others = 0
        if matrices:
            whole = size_in_bytes(matrices[0].stored.file.parent)
            self.others = whole - sum(one.stored.num_bytes for one in matrices)
        self.room = math.floor(target_gib * _GIB) - self.others

    def cost(self, one: WeightMatrix, scheme: Scheme) -> int:
        """Bytes of its levels, scales and zero points, and of what says how it is read."""
        layout = packed_layout(one.shape, one.dtype, scheme, own=True).values()
        return sum(dtype.itemsize * math.prod(size) for dtype, size in layout)

    def refusal(self, least: int) -> str:
        """What it takes in the fewest bits."""
        return (
            f"quantize.target_gib={self.target_gib:g}: with all of these matrices in "
            f"{self.schemes[0].bits} bits it takes {(self.others + least) / _GIB:.6g} GiB, of "
            f"which {self.others / _GIB:.6g} are other tensors"
        )


@dataclass(frozen=True)
class Allocation:
    """Which scheme each matrix has. errors: of each unit as chosen, by layer and expert."""

    schemes: dict[str, Scheme]
    bits: Mapping[Sharing, int]
    errors: Mapping[Sharing, float]
    average_bits: float

    def say(self) -> None:
        """Tell the bits of layers, or how many experts of each have how many."""
        layers: dict[int, Counter[int]] = {}
        for (layer, _), bits in self.bits.items():
            layers.setdefault(layer, Counter())[bits] += 1
        for layer, counts in sorted(layers.items()):
            words = [f"{bits} ({number})" if len(self.bits) > len(layers) else f"{bits}"
                     for bits, number in sorted(counts.items())]  # fmt: skip
            logger.info("layer %d: bits %s", layer, ", ".join(words))
        logger.info("%.3f bits a weight on average", self.average_bits)

    def to_json(self) -> list[dict[str, Any]]:
        """A row for each layer or expert."""
        return [
            {"layer": layer, "expert": expert, "bits": bits, "error": self.errors[layer, expert]}
            for (layer, expert), bits in self.bits.items()
        ]

    def figures(self) -> dict[str, float]:
        """For a report."""
        return {"mean_bits": self.average_bits, "predicted_error": sum(self.errors.values())}


def allocated(
    matrices: Sequence[WeightMatrix], budget: LevelsBudget, by: str, curves: Curves
) -> Allocation:
    """The schemes with the least sum of errors that fit the budget.

    curves: by layer, of each expert (by=expert) or of all together, the error in each scheme.
    """
    units: dict[Sharing, list[WeightMatrix]] = {}
    for one in matrices:
        units.setdefault((one.layer, one.expert if by == "expert" else None), []).append(one)
    groups = [
        [
            (sum(budget.cost(one, scheme) for one in some), curves[layer][expert or 0][place])
            for place, scheme in enumerate(budget.schemes)
        ]
        for (layer, expert), some in units.items()
    ]
    places = knapsack.best_choices(groups, budget.room)
    chosen = dict(zip(units, places, strict=True))
    schemes = {
        one.key: budget.schemes[chosen[unit]] for unit, some in units.items() for one in some
    }
    bits = {unit: budget.schemes[place].bits for unit, place in chosen.items()}
    errors = {
        unit: group[place][1] for (unit, place), group in zip(chosen.items(), groups, strict=True)
    }
    weights = sum(one.num_weights for one in matrices)
    mean = sum(schemes[one.key].bits * one.num_weights for one in matrices) / weights
    return Allocation(schemes, bits, errors, mean)


class Allocated(Quantizing):
    """A quantizer at work by an allocation, which its figures tell, too."""

    def __init__(self, at_work: Quantizing, allocation: Allocation):
        self.at_work, self.allocation = at_work, allocation
        self.schemes = allocation.schemes

    @property
    def notes(self) -> dict[int, Any]:
        """Those of the other."""
        return self.at_work.notes

    def layer(
        self, index: int, matrices: Sequence[WeightMatrix]
    ) -> Iterator[tuple[WeightMatrix, Levels]]:
        """The levels of a layer's matrices."""
        return self.at_work.layer(index, matrices)

    def finished(self, index: int, read: Mapping[str, Any]) -> None:
        """Handed on."""
        self.at_work.finished(index, read)

    def figures(self) -> dict[str, float]:
        """Of both."""
        return self.at_work.figures() | self.allocation.figures()
