"""The smallest set of experts that has a given share of the router's probability: top-p routing.

As "dynamic routing" (Huang et al. 2024) chooses, whose models are trained for it; here untrained,
and of the experts that the router chose: a token never gets more than it had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moe_lab.methods.skipping.base import SkipRule
from moe_lab.methods.skipping.thresholds import found_on_text, quantile, scoring_of
from moe_lab.models.edits.base import Edit
from moe_lab.models.edits.skip import SkipExperts
from moe_lab.models.skip_rules import Skipping, distribution, shares_before
from moe_lab.profile.fewer_experts import RoutedText
from moe_lab.profile.layer import LayerStatistics
from moe_lab.profile.profile import Profile
from moe_lab.types import LayerInfo, UserError


@dataclass(frozen=True)
class Mass:
    """The probability that a layer's sets have: a given one, or that of sets so large on average.

    An expert stays where those before it have less than that together; so the threshold for an
    average k is the quantile (k - 1) / (K - 1) of what those before have, over tokens and the
    experts behind the first.
    """

    mass: float | None
    average: float | None

    def __call__(self, one: LayerStatistics, routed: RoutedText) -> float:
        """The probability."""
        if self.average is None:
            return float(self.mass or 1.0)
        top_k = one.info.top_k
        share = (min(self.average, top_k) - 1) / max(1, top_k - 1)
        order_TK = routed.weight_TK.float().sort(dim=1, descending=True, stable=True)[1]
        share_TE = distribution(routed.logits_TE, scoring_of(one, "top_p"))
        before_TK = shares_before(share_TE, routed.index_TK.gather(1, order_TK))[:, 1:]
        return max(quantile(before_TK, share), 1e-6) if share < 1 else 1.0


class TopP(SkipRule):
    """The experts stay before which less than `mass` of the probability is."""

    takes = ("mass", "average_top_k", "num_samples")
    told = "the smallest set with sum p >= value stays, of the experts that the router chose"

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse neither or both of the budgets."""
        super().check(layers)
        if (self.options.mass is None) == (self.options.average_top_k is None):
            raise UserError(
                "method.rule=top_p needs to know how much: give one of method.mass=0.4 (the "
                "probability that the smallest set has) and method.average_top_k=2.5"
            )

    def edits(self, profile: Profile) -> tuple[Edit, ...]:
        """Each layer with the mass, or its own."""
        mass, average = self.options.mass, self.options.average_top_k
        return found_on_text(
            profile, self.options.rule, self.options.num_samples, self._rule, Mass(mass, average),
            mass=mass, average=average,
        )  # fmt: skip

    def _rule(self, one: LayerStatistics, value: float) -> Skipping:
        renormalize = self.options.renormalize is not False
        return Skipping("top_p", value, renormalize, scoring_of(one, self.options.rule))

    def example(self, layers: Sequence[LayerInfo]) -> tuple[Edit, ...]:
        """Edits of the same kind."""
        return tuple(
            SkipExperts(info.index, info.name, "top_p", 0.5, scoring="softmax") for info in layers
        )

    def notes(self) -> dict[str, Any]:
        """With the budget."""
        given = {"mass": self.options.mass, "average_top_k": self.options.average_top_k}
        return super().notes() | {name: one for name, one in given.items() if one is not None}
