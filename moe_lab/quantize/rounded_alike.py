"""Quantizers that look at nothing but each weight, and round all matrices by one scheme."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moe_lab.models.matrices import WeightMatrix
from moe_lab.models.rounding import Clip, Grid, Levels, Scheme, rounded
from moe_lab.quantize.base import QuantizeJob, Quantizing, joined_levels, slice_by_slice


@dataclass
class RoundedAlike(Quantizing):
    """All matrices of a job rounded to nearest by one scheme."""

    job: QuantizeJob
    scheme: Scheme
    grid: Grid = "full"
    clip: Clip = "none"

    def __post_init__(self) -> None:
        self.schemes = {one.key: self.scheme for one in self.job.chosen}

    def layer(
        self, index: int, matrices: Sequence[WeightMatrix]
    ) -> Iterator[tuple[WeightMatrix, Levels]]:
        """Each matrix by itself, slices of experts one by one."""
        for one in matrices:
            parts = [rounded(w, self.scheme, self.grid, self.clip) for w in slice_by_slice(one)]
            yield one, joined_levels(parts, one)
