"""Matrices rounded to nearest, each by a scheme of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from moe_lab.models.matrices import Matrix
from moe_lab.models.rounding import Clip, Levels, Scheme, rounded
from moe_lab.quantize.base import Quantizing, joined, slice_by_slice


@dataclass
class RoundedEach(Quantizing):
    """schemes: by the keys of the matrices."""

    schemes: Mapping[str, Scheme]
    clip: Clip = "none"

    def layer(self, index: int, matrices: Sequence[Matrix]) -> Iterator[tuple[Matrix, Levels]]:
        """Each matrix by itself, slices of experts one by one."""
        for one in matrices:
            scheme = self.schemes[one.key]
            parts = [rounded(w, scheme, clip=self.clip) for w in slice_by_slice(one)]
            yield one, joined(parts, one)
