"""DERN: experts go, and those that stay take in what is like theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from moe_lab.finite import check_scores
from moe_lab.lookup import require_kind
from moe_lab.methods.base import LmHead, Mtp
from moe_lab.methods.ratios import budget
from moe_lab.methods.ratios.budget import Ratio
from moe_lab.methods.refit import Refitting
from moe_lab.methods.scored import ByScores
from moe_lab.models.edits.base import Edit
from moe_lab.models.edits.plan import Plan
from moe_lab.models.edits.recombine import RecombineExperts
from moe_lab.models.layers import check_own_rows
from moe_lab.option import Option
from moe_lab.profile.profile import Profile
from moe_lab.types import LayerInfo, UserError


@dataclass(frozen=True)
class Dern(Refitting, ByScores):
    """Keep the experts that `metric` scores highest, and recombine the others into them.

    DERN (2509.10377): the paper's importance of an expert is the router's normalised weight, 0
    where it is not chosen, averaged over all tokens: metric=gate_sum, where the router's weights
    sum to 1. What joins what is found from the weights when the plan is carried out
    (`models/segments.py`).
    """

    threshold: Annotated[
        float, Option("cosine above which a hidden unit joins the one most like it", least=-1)
    ] = 0.6
    mtp: Mtp = "prune"
    lm_head: LmHead = "auto"

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse a ratio with which a router cannot work, and metrics without scores of experts."""
        super().check(layers)
        if "experts" not in self._metric.units or self._metric.judges_sets:
            raise UserError(
                f"method=dern keeps experts by their scores, and {self._metric.title} has none: "
                "metric=gate_sum, or another one of experts"
            )
        for info in layers:
            check_own_rows(info)
        require_kind("ratio", self.ratio, Ratio).check(layers)
        self._metric.check(layers)

    def example(self, layers: Sequence[LayerInfo]) -> tuple[Edit, ...]:
        """Edits of the plan's kind; how many experts go is not known, so that none does."""
        edits = [
            RecombineExperts(info.index, info.name, kept=tuple(range(info.num_experts)))
            for info in layers
        ]
        return self.followed(edits, layers)

    def foreseen(self, layers: Sequence[LayerInfo]) -> Mapping[int, int] | None:
        """What the ratio leaves, where no score enters it."""
        return self.ratio.foreseen(layers)

    @property
    def from_routers(self) -> bool:
        """Whether the routers' statistics are enough."""
        return self._metric.from_routers

    def decide(self, profile: Profile) -> Plan:
        """One edit for each MoE layer."""
        layers = [layer.info for layer in profile.statistics]
        scores = list(zip(layers, self._metric.scores(profile), strict=True))
        for info, score_E in scores:
            check_scores(info.index, info.num_experts, score_E, self._metric.title)
        numbers = self.ratio.numbers(scores, profile)
        kept = budget.kept(scores, numbers)
        edits = tuple(
            RecombineExperts(
                info.index, info.name, kept[info.index], self.threshold, tuple(score_E.tolist())
            )
            for info, score_E in scores
        )
        notes = self.ratio.told(layers, numbers) | self.ratio.notes(scores, numbers)
        return Plan(edits, notes=notes)
