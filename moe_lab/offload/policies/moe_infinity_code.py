"""MoE-Infinity as its released code has it: no prefetching by default, eviction by uses since the
fetch, and a match over the layers that the pass has not seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from moe_lab.offload.accesses import Accesses
from moe_lab.offload.activation import ActivationGuide
from moe_lab.offload.steered import Guide, Steered
from moe_lab.option import Option


@dataclass(frozen=True)
class MoEInfinityCode(Steered):
    """EfficientMoE/MoE-Infinity d617801; where it differs from the paper, as it is."""

    size: Annotated[int, Option("requests that the collection holds", least=1)] = 1000
    prefetch: Annotated[bool, Option("fetch ahead")] = False

    def guide(self, accesses: Accesses) -> Guide:
        """By the code."""
        return ActivationGuide(accesses, self.size, self.prefetch, of_code=True)
