"""As many experts as a token's routing is undecided: adaptive k by the router's entropy.

k_t = k_min + ceil(H_t / ln N * (K - k_min)), H_t the entropy of the router's distribution over its
N experts. No paper could be verified for it, only code of third parties; it has no budget, since
nothing in it is free but k_min.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from moe_lab.methods.skipping.base import SkipRule
from moe_lab.methods.skipping.thresholds import found_on_text, renormalizes, scoring_of
from moe_lab.models.edits.base import Edit
from moe_lab.models.edits.skip import SkipExperts
from moe_lab.models.skip_rules import Skipping
from moe_lab.profile.fewer_experts import RoutedText
from moe_lab.profile.profile import Profile
from moe_lab.types import LayerInfo, UserError


@dataclass(frozen=True)
class Undecided:
    """The rule of a layer: fewest is k_min, at most what its router chooses."""

    fewest: int
    renormalize: bool | None

    def __call__(self, info: LayerInfo, routed: RoutedText) -> Skipping:
        """The rule, which depends on the text in nothing but what the family's weights are."""
        value, scoring = float(min(self.fewest, info.top_k)), scoring_of(info, routed, "entropy")
        return Skipping("entropy", value, renormalizes(self.renormalize, routed), scoring)


class Entropy(SkipRule):
    """The heaviest k_t experts of each token stay."""

    takes = ("min_top_k", "num_samples")
    defaults: ClassVar = {"min_top_k": 1}
    told = "the first value + ceil(H / ln N * (K - value)) experts stay"

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse a least number with which nothing could be skipped."""
        super().check(layers)
        fewest, most = self.option("min_top_k"), max(info.top_k for info in layers)
        if fewest >= most:
            raise UserError(
                f"method.min_top_k={fewest}: the model gives a token {most} experts, so that none "
                f"would be skipped; it can be from 1 to {most - 1}"
            )

    def edits(self, profile: Profile) -> tuple[Edit, ...]:
        """Each layer with the same rule; how many experts stay is told of the text."""
        rule_of = Undecided(self.option("min_top_k"), self.options.renormalize)
        return found_on_text(profile, self.options.num_samples, rule_of, asdict(rule_of))

    def example(self, layers: Sequence[LayerInfo]) -> tuple[Edit, ...]:
        """Edits of the same kind."""
        return tuple(
            SkipExperts(info.index, info.name, "entropy", 1.0, scoring="softmax") for info in layers
        )

    def notes(self) -> dict[str, Any]:
        """With the least number."""
        return super().notes() | {"min_top_k": self.option("min_top_k")}
