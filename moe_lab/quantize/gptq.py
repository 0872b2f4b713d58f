"""GPTQ (2210.17323) of experts on their own routed tokens, as llm-compressor computes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, cast

from moe_lab.models.rounding import CLIPS, Clip, Scheme
from moe_lab.option import Option
from moe_lab.quantize.base import (
    BitsOption,
    GroupOption,
    QuantizeJob,
    Quantizer,
    Quantizing,
    WhatOption,
)
from moe_lab.quantize.calibrated import Calibrated
from moe_lab.quantize.column_rounding import ACT_ORDERS, DAMPING, LevelChoice
from moe_lab.quantize.hessians import TOKEN_WEIGHTS

ClipOption = Annotated[
    str, Option("the range of a group: as it is, or of least squared error", among=CLIPS)
]
SymmetricOption = Annotated[bool, Option("without zero points")]
ActOrderOption = Annotated[
    str,
    Option(
        "of columns: those of the largest inputs first (scales as without), or as they stand",
        among=ACT_ORDERS,
    ),
]
DampingOption = Annotated[
    float, Option("what is added to the Hessian's diagonal, of its mean", above=0)
]
TokenWeightOption = Annotated[
    str,
    Option(
        "of a token in an expert's Hessian: 1, or the square of its router weight",
        among=TOKEN_WEIGHTS,
    ),
]
LeastTokensOption = Annotated[
    int, Option("an expert with fewer tokens is rounded to nearest", least=1)
]


@dataclass(frozen=True, kw_only=True)
class Compensating(Quantizer):
    """What quantizers have in common that may choose levels by GPTQ."""

    group_size: GroupOption = 128
    symmetric: SymmetricOption = True
    clip: ClipOption = "none"
    act_order: ActOrderOption = "static"
    damping: DampingOption = DAMPING
    token_weight: TokenWeightOption = "none"
    least_tokens: LeastTokensOption = 1

    def given(self, scheme: Scheme) -> LevelChoice:
        """How the levels of a scheme are chosen."""
        clip = cast(Clip, self.clip)
        return LevelChoice(scheme, "full", clip, self.act_order, self.damping)


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
        schemes = {one.key: self.scheme for one in job.chosen}
        return Calibrated(job, schemes, self.given, self.token_weight, self.least_tokens)
