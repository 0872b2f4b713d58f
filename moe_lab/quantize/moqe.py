"""MoQE (2310.02410): the experts alone, rounded to nearest without data.

One scale for each output, s = max|W| / (2^(b-1) - 1), and symmetric levels; routers, attention,
dense layers and embeddings stay. Published for 8, 4 and 3 bits; 2 bits the paper trains with
quantisation in the loop. That levels are cut at both ends alike is our reading of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_lab.models.rounding import Reads, Scheme
from moe_lab.quantize.base import BitsOption, QuantizeJob, Quantizer, Quantizing, WhatOption
from moe_lab.quantize.rounded_each import RoundedEach, reading


@dataclass(frozen=True)
class Moqe(Quantizer):
    """MoQE's scheme; what: its figure of robustness packs another part in the experts' place."""

    bits: BitsOption = 4
    what: WhatOption = "experts"

    @property
    def scheme(self) -> Scheme:
        """That of every matrix."""
        return Scheme(self.bits)

    def reader(self, layer: int) -> Reads:
        """Each weight becomes the nearest level."""
        return reading(self.scheme, grid="restricted")

    def begin(self, job: QuantizeJob) -> Quantizing:
        """Nothing has to be found out."""
        return RoundedEach(job.alike(self.scheme), grid="restricted")
