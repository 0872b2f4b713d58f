"""What looks at nothing but each weight: matrices rounded to nearest, each by its scheme."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from moe_lab.models.matrices import WeightMatrix
from moe_lab.models.rounding import Clip, Grid, Levels, Reads, Scheme, dequantised, rounded
from moe_lab.quantize.base import Quantizing, joined_levels, slice_by_slice


def reading(scheme: Scheme, grid: Grid = "full", clip: Clip = "none") -> Reads:
    """What makes of a weight what a reader will, once it is rounded to nearest."""
    return functools.partial(_read, scheme=scheme, grid=grid, clip=clip)


def _read(weight: Tensor, scheme: Scheme, grid: Grid, clip: Clip) -> Tensor:
    return dequantised(rounded(weight, scheme, grid, clip))


@dataclass
class RoundedEach(Quantizing):
    """schemes: by the keys of the matrices, of several or one for all."""

    schemes: Mapping[str, Scheme]
    grid: Grid = "full"
    clip: Clip = "none"

    def layer(
        self, index: int, matrices: Sequence[WeightMatrix]
    ) -> Iterator[tuple[WeightMatrix, Levels]]:
        """Each matrix by itself, slices of experts one by one."""
        for one in matrices:
            scheme = self.schemes[one.key]
            parts = [rounded(w, scheme, self.grid, self.clip) for w in slice_by_slice(one)]
            yield one, joined_levels(parts, one)
