"""Experts whose weight is small beside the token's heaviest are skipped: NAEE's rule for any top-k.

Ours beyond two experts per token, where the paper has none: each of them is held against the
heaviest, with one threshold for each layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_lab.methods.skipping.by_ratio import ByRatio
from moe_lab.types import LayerInfo, UserError


class Ratio(ByRatio):
    """The median, another quantile, or what leaves a given average."""

    takes = ("quantile", "average_top_k", "num_samples")
    told = "experts with g_j < value * g_1 are skipped"

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse two budgets at once."""
        super().check(layers)
        if self.options.quantile is not None and self.options.average_top_k is not None:
            raise UserError(
                "method.quantile and method.average_top_k both say how many experts are skipped: "
                "give one of them"
            )

    def notes(self) -> dict[str, Any]:
        """With the quantile."""
        share = 0.5 if self.options.quantile is None else self.options.quantile
        average = self.options.average_top_k
        budget = {"quantile": share} if average is None else {"average_top_k": average}
        return super().notes() | budget
