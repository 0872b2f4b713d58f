"""What a diagnosis looks at, and what it refuses beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from moe_lab.option import Option, Plugin, check_options
from moe_lab.types import LayerInfo, UserError


@dataclass(frozen=True)
class Diagnosis(Plugin):
    """What is looked at beside the profile, which costs nothing more."""

    weights: Annotated[bool, Option("similarity of the experts' weights: all are read once")] = True
    num_samples: Annotated[
        int,
        Option(
            "similarity of the experts' outputs: each runs on every token of so many calibration "
            "samples, 0 for none",
            least=0,
        ),
    ] = 16

    def __post_init__(self) -> None:
        check_options(self, "diagnose")

    def check(self, profile: str, layers: Sequence[LayerInfo]) -> None:
        """Refuse a profile of the routers alone, and rows of routers without experts of their own.

        profile: compute.profile. Such rows have sums, but neither weights nor outputs of their own.
        """
        if profile == "routers":
            raise UserError(
                "diagnose=full needs the norms of the experts' outputs, which "
                "compute.profile=routers does not collect: set compute.profile=all"
            )
        for info in layers if self.weights or self.num_samples else ():
            if info.real_experts:
                raise UserError(
                    f"diagnose=full compares the experts' weights and outputs, and of layer "
                    f"{info.index} {info.num_experts} router rows lead to {info.real_experts} "
                    "experts: leave that out with diagnose.weights=false diagnose.num_samples=0"
                )
