"""GPTQ (2210.17323) of experts on their own routed tokens, as llm-compressor computes it."""

from __future__ import annotations

from dataclasses import dataclass

from moe_lab.models.rounding import Scheme
from moe_lab.quantize.base import BitsOption, QuantizeJob, Quantizing, WhatOption
from moe_lab.quantize.calibrated import Calibrated, Compensating


@dataclass(frozen=True, kw_only=True)
class Gptq(Compensating):
    """Each matrix on the inputs that it gets, layer by layer behind those already in few bits.

    Gate and up projection by the Hessian of the tokens that the router sends to the expert, the
    down projection by that of its hidden units; linear layers by that of their inputs.
    """

    bits: BitsOption = 4
    what: WhatOption = "experts"

    @property
    def needs_text(self) -> bool:
        """It looks at the calibration text."""
        return True

    @property
    def scheme(self) -> Scheme:
        """That of every matrix."""
        return Scheme(self.bits, self.group_size, self.symmetric)

    def begin(self, job: QuantizeJob) -> Quantizing:
        """From the first layer on."""
        schemes = job.alike(self.scheme)
        return Calibrated(job, schemes, self.given, self.token_weight, self.least_tokens)
