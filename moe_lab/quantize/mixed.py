"""Bits where they are worth most: measured errors, and the least sum of them under one budget."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from moe_lab.integrity import write_whole
from moe_lab.models.matrices import WeightMatrix
from moe_lab.models.rounding import BITS, Scheme
from moe_lab.option import Option, check_options
from moe_lab.profile.grams import TOKEN_WEIGHTS
from moe_lab.quantize.allocation import Allocated, BitsBudget, LevelsBudget, SizeBudget, allocated
from moe_lab.quantize.base import QuantizeJob, Quantizing, check_groups
from moe_lab.quantize.calibrated import Calibrated, Compensating
from moe_lab.quantize.measuring import ErrorsInBits, predictions
from moe_lab.quantize.rounded_each import RoundedEach
from moe_lab.types import UserError

BY, ERRORS, LEVELS = ("layer", "expert"), ("output", "kl"), ("rtn", "gptq")
ALLOCATION = "allocation.json"


@dataclass(frozen=True, kw_only=True)
class Mixed(Compensating):
    """Each expert, or all experts of a layer, in that number of bits which the budget is best spent
    on: the least sum of measured errors, found exactly (`knapsack.py`).

    by=layer is one scheme for all experts of a layer; by=expert one for each expert. Errors are
    those of the intact model (`error_curves.py`, or by error=kl of its predictions) with one of
    them in few bits; that they add up is an assumption. The levels that are stored, and whose
    errors are measured, are rounded to nearest, or GPTQ's, layer by layer behind those in few bits.
    """

    bits: Annotated[
        Sequence[int], Option("numbers of bits among which is chosen", least=2, most=max(BITS))
    ] = (2, 3, 4, 8)
    average_bits: Annotated[
        float | None,
        Option("budget: mean bits of the experts' weights, scales not counted", above=0),
    ] = None
    target_gib: Annotated[
        float | None,
        Option("budget: GiB that the model's weights take as saved, in the place of bits", above=0),
    ] = None
    by: Annotated[str, Option("what has one number of bits", among=BY)] = "layer"
    levels: Annotated[str, Option("rounded to nearest, or by GPTQ", among=LEVELS)] = "rtn"
    error: Annotated[
        str,
        Option("of the states behind a layer, or of the model's predictions", among=ERRORS),
    ] = "output"
    error_weight: Annotated[
        str,
        Option(
            "of error=output: what a token weighs, 1 / the mean square of its state, or 1",
            among=TOKEN_WEIGHTS,
        ),
    ] = "output"
    num_samples: Annotated[
        int, Option("of error=kl: first calibration samples, to measure on", least=1)
    ] = 32

    @property
    def needs_text(self) -> bool:
        """Errors are measured on it."""
        return True

    @property
    def schemes(self) -> list[Scheme]:
        """Those among which is chosen, ascending."""
        return [Scheme(b, self.group_size, self.symmetric) for b in sorted(set(self.bits))]

    def check(self, matrices: Sequence[WeightMatrix]) -> None:
        """Refuse options that do not go together, and a budget below what the fewest bits take."""
        check_options(self, "quantize")
        if not self.bits:
            raise UserError("quantize.bits=[]: name the numbers of bits among which is chosen")
        if (self.average_bits is None) is (self.target_gib is None):
            raise UserError(
                "quantize=mixed needs one budget: quantize.average_bits=<bits of a weight> or "
                "quantize.target_gib=<GiB of the whole checkpoint>"
            )
        if self.error == "kl" and (self.by == "expert" or self.levels == "gptq"):
            name = "by" if self.by == "expert" else "levels"
            raise UserError(
                f"quantize.error=kl takes a forward of the model for each layer and number of "
                f"bits, rounded to nearest: with quantize.{name}={getattr(self, name)} ask for "
                "quantize.error=output"
            )
        check_groups(matrices, self.schemes[0])
        fused = next((one for one in matrices if one.expert is None), None)
        if self.by == "expert" and fused:
            raise UserError(
                f"quantize.by=expert: the files have the experts of a layer in one tensor "
                f"({fused.key}), which has one scheme: quantize.by=layer"
            )
        if self.average_bits is not None:
            self._budget(matrices).check()

    def check_size(self, chosen: Sequence[WeightMatrix]) -> None:
        """Refuse a size that is less than they take in the fewest bits."""
        self._budget(chosen).check()

    def _budget(self, matrices: Sequence[WeightMatrix]) -> LevelsBudget:
        if self.target_gib is None:
            return BitsBudget(matrices, self.schemes, self.average_bits or 0.0)
        return SizeBudget(matrices, self.schemes, self.target_gib)

    def begin(self, job: QuantizeJob) -> Quantizing:
        """Measure what was not measured yet, and decide."""
        if self.error == "kl":
            curves = predictions(job, self.schemes, self.num_samples)
        else:
            given = [self.given(scheme) for scheme in self.schemes]
            measuring = ErrorsInBits(
                given, self.by, self.levels == "gptq", self.error_weight, self.token_weight,
                self.least_tokens,
            )  # fmt: skip
            curves = measuring.outputs(job)
        allocation = allocated(job.chosen, self._budget(job.chosen), self.by, curves)
        allocation.say()
        write_whole(job.folder / ALLOCATION, json.dumps(allocation.to_json()) + "\n")
        at_work: Quantizing
        if self.levels == "gptq":
            at_work = Calibrated(
                job, allocation.schemes, self.given, self.token_weight, self.least_tokens
            )
        else:
            at_work = RoundedEach(allocation.schemes, clip=self.given(self.schemes[0]).clip)
        return Allocated(at_work, allocation)
