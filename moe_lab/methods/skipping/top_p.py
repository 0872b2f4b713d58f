"""The smallest set of experts that has a given share of the router's probability: top-p routing.

As "dynamic routing" (Huang et al. 2024) chooses, whose models are trained for it; here untrained,
and of the experts that the router chose: a token never gets more than it had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from moe_lab.methods.skipping.base import SkipRule
from moe_lab.methods.skipping.thresholds import (
    found_on_text,
    quantile,
    renormalizes,
    scoring_of,
)
from moe_lab.models.edits.base import Edit
from moe_lab.models.edits.skip import SkipExperts
from moe_lab.models.skip_rules import Skipping, distribution, shares_before
from moe_lab.profile.fewer_experts import RoutedText
from moe_lab.profile.profile import Profile
from moe_lab.types import LayerInfo, UserError


@dataclass(frozen=True)
class Smallest:
    """The rule of a layer: sets with a given probability, or with that of sets so large on average.

    An expert stays where those before it have less than that together; so the threshold for an
    average k is the quantile (k - 1) / (K - 1) of what those before have, over tokens and the
    experts behind the first.
    """

    mass: float | None
    average: float | None
    renormalize: bool | None

    def __call__(self, info: LayerInfo, routed: RoutedText) -> Skipping:
        """The rule, whose value is the probability."""
        scoring, value = scoring_of(info, routed, "top_p"), self.mass or 1.0
        if self.average is not None:
            share = (min(self.average, info.top_k) - 1) / max(1, info.top_k - 1)
            value = max(quantile(_before(routed, scoring), share), 1e-6) if share < 1 else 1.0
        return Skipping("top_p", value, renormalizes(self.renormalize, routed), scoring)


def _before(routed: RoutedText, scoring: str) -> Tensor:
    """What the experts before each one have, behind each token's heaviest: [T, K - 1]."""
    order_TK = routed.weight_TK.float().abs().sort(dim=1, descending=True, stable=True)[1]
    share_TE = distribution(routed.logits_TE, scoring)
    return shares_before(share_TE, routed.index_TK.gather(1, order_TK))[:, 1:]


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
        rule_of = Smallest(self.options.mass, self.options.average_top_k, self.options.renormalize)
        return found_on_text(profile, self.options.num_samples, rule_of, asdict(rule_of))

    def example(self, layers: Sequence[LayerInfo]) -> tuple[Edit, ...]:
        """Edits of the same kind."""
        return tuple(
            SkipExperts(info.index, info.name, "top_p", 0.5, scoring="softmax") for info in layers
        )

    def notes(self) -> dict[str, Any]:
        """With the budget."""
        given = {"mass": self.options.mass, "average_top_k": self.options.average_top_k}
        return super().notes() | {name: one for name, one in given.items() if one is not None}
