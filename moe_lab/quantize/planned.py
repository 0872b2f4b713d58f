"""The bits that the run's plan decided together with what it prunes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch

from moe_lab.models.matrices import WeightMatrix
from moe_lab.models.rounding import Reads, Scheme
from moe_lab.option import Option, check_options
from moe_lab.quantize.base import QuantizeJob, Quantizer, Quantizing
from moe_lab.quantize.rounded_each import RoundedEach, reading
from moe_lab.types import UserError

NOTE = "quantize"  # in a plan's notes: bits by layer, and group_size
WHOLE = 16  # bits of layers that stay as they are


@dataclass(frozen=True)
class Planned(Quantizer):
    """Rounded to nearest by what method=prune method.unit=both ratio.bits=[...] wrote down.

    bits, group_size: taken from the plan, and given by nobody else.
    """

    bits: Annotated[Mapping[str, int] | None, Option("by layer; null: those of the run's plan")] = (
        None
    )
    group_size: Annotated[int | None, Option("of the run's plan, with its bits", least=1)] = None

    @property
    def follows_plan(self) -> bool:
        """It knows nothing by itself."""
        return True

    def obeying(self, notes: Mapping[str, Any]) -> Quantizer | None:
        """With the bits of the plan; None where these leave every layer as it is."""
        told = notes.get(NOTE)
        if not told:
            raise UserError(
                "quantize=planned stores what the plan decided, and this plan decides no bits: ask "
                "for method=prune method.unit=both ratio=sensitivity ratio.bits=[2,4,8,16], or for "
                "another quantize"
            )
        if all(bits == WHOLE for bits in told["bits"].values()):
            return None
        return dataclasses.replace(self, bits=told["bits"], group_size=told["group_size"])

    def identity(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """With what the plan says."""
        return dict(options) | {"bits": dict(self.bits or {}), "group_size": self.group_size}

    def packs(self, matrix: WeightMatrix) -> bool:
        """Not the layers that stay as they are."""
        return self._bits_of(matrix) != WHOLE

    def _bits_of(self, matrix: WeightMatrix) -> int | None:
        return None if self.bits is None else self.bits[str(matrix.layer)]

    def check(self, matrices: Sequence[WeightMatrix]) -> None:
        """Nothing is known before the plan, which has divided widths by groups."""
        check_options(self, "quantize")

    def reader(self, layer: int) -> Reads | None:
        """By the layer's bits; as they are where these are not rounded."""
        bits = self.bits[str(layer)] if self.bits else WHOLE
        return torch.clone if bits == WHOLE else reading(Scheme(bits, self.group_size))

    def begin(self, job: QuantizeJob) -> Quantizing:
        """Nothing has to be found out."""
        assert self.bits is not None
        by_layer = {int(layer): bits for layer, bits in self.bits.items()}
        schemes = {one.key: Scheme(by_layer[one.layer], self.group_size) for one in job.chosen}
        return RoundedEach(schemes)
