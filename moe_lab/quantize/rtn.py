"""Round to nearest: no calibration, a scale for each group of inputs or each output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, cast

from moe_lab.models.rounding import CLIPS, Clip, Reads, Scheme
from moe_lab.option import Option
from moe_lab.quantize.base import (
    BitsOption,
    GroupOption,
    QuantizeJob,
    Quantizer,
    Quantizing,
    WhatOption,
)
from moe_lab.quantize.rounded_each import RoundedEach, reading


@dataclass(frozen=True)
class RoundToNearest(Quantizer):
    """Each weight becomes the nearest level; levels reach as far as compressed-tensors' observer.

    clip: "mse" searches for each group the range that leaves the least squared error.
    """

    bits: BitsOption = 4
    group_size: GroupOption = 128
    symmetric: Annotated[bool, Option("without zero points")] = True
    clip: Annotated[
        str, Option("the range of a group: as it is, or of least squared error", among=CLIPS)
    ] = "none"
    what: WhatOption = "experts"

    @property
    def scheme(self) -> Scheme:
        """That of every matrix."""
        return Scheme(self.bits, self.group_size, self.symmetric)

    def reader(self, layer: int) -> Reads:
        """Each weight becomes the nearest level."""
        return reading(self.scheme, clip=cast(Clip, self.clip))

    def begin(self, job: QuantizeJob) -> Quantizing:
        """Nothing has to be found out."""
        return RoundedEach(job.alike(self.scheme), clip=cast(Clip, self.clip))
