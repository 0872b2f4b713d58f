"""What a diagnosis looks at, and what it refuses beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_lab.types import LayerInfo, UserError


@dataclass(frozen=True)
class Diagnosis:
    """What is looked at beside the profile, which costs nothing more.

    weights: read all experts, for the similarity of their weights. num_samples: run every expert on
    every token of the first so many calibration samples, for the similarity of their outputs; 0
    leaves it out.
    """

    weights: bool = True
    num_samples: int = 16

    def __post_init__(self) -> None:
        if self.num_samples < 0:
            raise UserError(f"diagnose.num_samples={self.num_samples}: it must be at least 0")

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
