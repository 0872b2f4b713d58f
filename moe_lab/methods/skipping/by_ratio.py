"""Rules that hold a token's weights against its heaviest one: what they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from moe_lab.methods.skipping.base import SkipRule
from moe_lab.methods.skipping.thresholds import found_on_text, quantile, ratios, renormalizes
from moe_lab.models.edits.base import Edit
from moe_lab.models.edits.skip import SkipExperts
from moe_lab.models.skip_rules import Skipping
from moe_lab.profile.fewer_experts import RoutedText
from moe_lab.profile.profile import Profile
from moe_lab.types import LayerInfo


@dataclass(frozen=True)
class Below:
    """Skip what is below a quantile of g_j / g_1 over the layer's tokens and j = 2 .. K.

    share: which; or average: such that a token has so many experts on average.
    """

    share: float
    average: float | None
    renormalize: bool | None

    def __call__(self, info: LayerInfo, routed: RoutedText) -> Skipping:
        """The rule, whose value is the quantile."""
        share = self.share
        if self.average is not None:
            share = (info.top_k - min(self.average, info.top_k)) / max(1, info.top_k - 1)
        value = quantile(ratios(routed.weight_TK), share)
        return Skipping("ratio", value, renormalizes(self.renormalize, routed))


class ByRatio(SkipRule):
    """Skip the experts j with g_j < beta g_1, beta the layer's quantile of g_j / g_1."""

    def edits(self, profile: Profile) -> tuple[Edit, ...]:
        """Each layer with its own threshold."""
        share = 0.5 if self.options.quantile is None else self.options.quantile
        rule_of = Below(share, self.options.average_top_k, self.option("renormalize"))
        return found_on_text(profile, self.options.num_samples, rule_of, asdict(rule_of))

    def example(self, layers: Sequence[LayerInfo]) -> tuple[Edit, ...]:
        """Edits of the same kind."""
        return tuple(SkipExperts(info.index, info.name, "ratio", 0.5) for info in layers)
