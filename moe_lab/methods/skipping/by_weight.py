"""Rules that look at a token's weights: what they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor

from moe_lab.methods.skipping.base import SkipRule
from moe_lab.methods.skipping.thresholds import found_on_text, quantile, renormalizes
from moe_lab.models.edits.base import Edit
from moe_lab.models.edits.skip import SkipExperts
from moe_lab.models.skip_rules import Skipping
from moe_lab.profile.fewer_experts import RoutedText
from moe_lab.profile.profile import Profile
from moe_lab.types import LayerInfo, SkipName, UserError


@dataclass(frozen=True)
class Below:
    """Skip what is below a quantile of what `behind_heaviest` says of a layer's tokens.

    rule: ratio or weight; share: which quantile; or average: such that a token has so many experts
    on average.
    """

    rule: SkipName
    share: float
    average: float | None
    renormalize: bool | None

    def __call__(self, info: LayerInfo, routed: RoutedText) -> Skipping:
        """The rule, whose value is the quantile."""
        share = self.share
        if self.average is not None:
            share = (info.top_k - min(self.average, info.top_k)) / max(1, info.top_k - 1)
        value = quantile(behind_heaviest(self.rule, routed.weight_TK), share)
        return Skipping(self.rule, value, renormalizes(self.renormalize, routed))


def behind_heaviest(rule: SkipName, weight_TK: Tensor) -> Tensor:
    """Of the experts behind each token's heaviest, g_1, in order: g_j / g_1, or g_j, [T, K - 1]."""
    ranked_TK = weight_TK.double().abs().sort(dim=1, descending=True)[0]
    return ranked_TK[:, 1:] / (ranked_TK[:, :1] if rule == "ratio" else 1.0)


class ByWeight(SkipRule):
    """Skip the experts whose weight is below a threshold, a quantile of the layer's."""

    takes: ClassVar[tuple[str, ...]] = ("quantile", "average_top_k", "num_samples")
    kind: ClassVar[SkipName]

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse two budgets at once."""
        super().check(layers)
        if self.options.quantile is not None and self.options.average_top_k is not None:
            raise UserError(
                "method.quantile and method.average_top_k both say how many experts are skipped: "
                "give one of them"
            )

    @property
    def _share(self) -> float:
        return 0.5 if self.options.quantile is None else self.options.quantile

    def edits(self, profile: Profile) -> tuple[Edit, ...]:
        """Each layer with its own threshold."""
        average, renormalize = self.options.average_top_k, self.option("renormalize")
        rule_of = Below(self.kind, self._share, average, renormalize)
        return found_on_text(profile, self.options.num_samples, rule_of, asdict(rule_of))

    def example(self, layers: Sequence[LayerInfo]) -> tuple[Edit, ...]:
        """Edits of the same kind."""
        return tuple(SkipExperts(info.index, info.name, self.kind, 0.5) for info in layers)

    def notes(self) -> dict[str, Any]:
        """With the quantile, or the average."""
        average = self.options.average_top_k
        budget = {"quantile": self._share} if average is None else {"average_top_k": average}
        return super().notes() | budget
