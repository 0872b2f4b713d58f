"""The family of criteria that are powers of router weight and output norm over routed tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from moe_lab.methods.metrics.base import Metric
from moe_lab.option import Option
from moe_lab.profile.layer import POWERS, LayerStatistics
from moe_lab.types import LayerInfo, UserError


@dataclass(frozen=True)
class Unified(Metric):
    """S_j = (1/|X_j| if mean) sum_{x in X_j} g_j(x)^gate_power ||f_j(x)||_2^norm_power [E].

    2606.15716, with (mean, gate_power, norm_power) for its (b, alpha, beta): frequency is
    (0, 0, 0), gate_sum (0, 1, 0), ean (0, 0, 1), REAP (1, 1, 1), MAN (1, 0, 1), MSAN (1, 0, 2). 0
    for an expert that saw no token.
    """

    mean: Annotated[bool, Option("divided by how many tokens were routed to the expert")] = True
    gate_power: Annotated[int, Option("power of the router weight", among=(0, 1, 2))] = 1
    norm_power: Annotated[int, Option("power of the output norm", among=(0, 1, 2))] = 1

    @property
    def from_routers(self) -> bool:
        """Without the norm the routers' sums are enough."""
        return self.norm_power == 0

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse powers that are not collected, and the mean of 1."""
        super().check(layers)
        if self.mean and not self.gate_power and not self.norm_power:
            raise UserError(
                "metric.gate_power=0 and metric.norm_power=0 give every expert that saw a token a "
                "mean of 1: ask for a power of at least 1, or for metric.mean=false, which counts"
            )

    def score(self, layer: LayerStatistics) -> Tensor:
        """The sum or mean of one pair of powers."""
        name = POWERS[self.gate_power, self.norm_power]
        return layer.mean(name) if self.mean else layer[name]
