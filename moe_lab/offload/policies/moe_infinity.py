"""MoE-Infinity as its paper has it (2401.14361): activation matrices of past requests steer all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from moe_lab.offload.accesses import Accesses
from moe_lab.offload.activation import ActivationGuide
from moe_lab.offload.steered import Guide, Steered
from moe_lab.option import Option


@dataclass(frozen=True)
class MoEInfinity(Steered):
    """The collection begins empty and takes each request in when it is over."""

    size: Annotated[int, Option("requests that the collection holds", least=1)] = 1000
    prefetch: Annotated[bool, Option("fetch ahead")] = True

    def guide(self, accesses: Accesses) -> Guide:
        """By the paper."""
        return ActivationGuide(accesses, self.size, self.prefetch, of_code=False)
