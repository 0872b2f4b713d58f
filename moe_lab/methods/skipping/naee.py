"""Dynamic skipping of NAEE (Lu et al. 2402.14800): of two experts the second is skipped.

Where g_2 < beta g_1, beta the median of g_2 / g_1 over the calibration text, a layer's own; what is
left has the weight 1. As in the authors' code (Lucky-Lance/Expert_Sparsity), which is for Mixtral.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from moe_lab.methods.skipping.by_weight import ByWeight
from moe_lab.types import LayerInfo, UserError


class Naee(ByWeight):
    """The median, and two experts per token; `ratio` is ours for others."""

    kind = "ratio"
    takes = ("num_samples",)
    defaults: ClassVar = {"renormalize": True}
    told = "the second expert is skipped where g_2 < value * g_1"

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse models with another number of experts per token."""
        super().check(layers)
        if numbers := sorted({info.top_k for info in layers} - {2}):
            raise UserError(
                f"method.rule=naee skips the second of two experts, and this model gives a token "
                f"{numbers[0]}: method.rule=ratio is the same rule for any number (ours)"
            )
