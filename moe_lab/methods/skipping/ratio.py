"""Experts whose weight is small beside the token's heaviest are skipped: NAEE's rule for any top-k.

Ours beyond two experts per token, where the paper has none: each of them is held against the
heaviest, with one threshold for each layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from moe_lab.methods.skipping.base import SkipRule
from moe_lab.methods.skipping.thresholds import found_on_text, quantile, ratios
from moe_lab.models.edits.base import Edit
from moe_lab.models.edits.skip import SkipExperts
from moe_lab.models.skip_rules import Skipping
from moe_lab.profile.fewer_experts import RoutedText
from moe_lab.profile.layer import LayerStatistics
from moe_lab.profile.profile import Profile
from moe_lab.types import LayerInfo, UserError


@dataclass(frozen=True)
class Quantile:
    """The threshold of a layer: a quantile of g_j / g_1 over tokens and j = 2 .. K.

    share: which; or average: such that a token has so many experts on average.
    """

    share: float | None
    average: float | None

    def __call__(self, one: LayerStatistics, routed: RoutedText) -> float:
        """The quantile."""
        top_k, share = one.info.top_k, self.share
        if self.average is not None:
            share = (top_k - min(self.average, top_k)) / max(1, top_k - 1)
        return quantile(ratios(routed.weight_TK), 0.5 if share is None else share)


class Ratio(SkipRule):
    """Skip the experts j with g_j < beta g_1, beta the layer's quantile of g_j / g_1."""

    takes: ClassVar[tuple[str, ...]] = ("quantile", "average_top_k", "num_samples")
    told = "experts with g_j < value * g_1 are skipped"

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse two budgets at once."""
        super().check(layers)
        if self.options.quantile is not None and self.options.average_top_k is not None:
            raise UserError(
                "method.quantile and method.average_top_k both say how many experts are skipped: "
                "give one of them"
            )

    def edits(self, profile: Profile) -> tuple[Edit, ...]:
        """Each layer with its own threshold."""
        share, average = self.options.quantile, self.options.average_top_k
        return found_on_text(
            profile, self.options.rule, self.options.num_samples,
            lambda one, value: self._rule(value), Quantile(share, average),
            quantile=share, average=average,
        )  # fmt: skip

    def _rule(self, value: float) -> Skipping:
        return Skipping("ratio", value, self.options.renormalize is not False)

    def example(self, layers: Sequence[LayerInfo]) -> tuple[Edit, ...]:
        """Edits of the same kind."""
        return tuple(SkipExperts(info.index, info.name, "ratio", 0.5) for info in layers)

    def notes(self) -> dict[str, Any]:
        """With the quantile."""
        share = 0.5 if self.options.quantile is None else self.options.quantile
        average = self.options.average_top_k
        budget = {"quantile": share} if average is None else {"average_top_k": average}
        return super().notes() | budget
