"""M-SMoE: experts join the most used ones that are routed alike."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moe_lab.methods.grouping.base import Grouping, Groups, MergeCandidates, grouped, router_groups
from moe_lab.methods.metrics.frequency import frequency
from moe_lab.methods.ratios import budget
from moe_lab.profile.layer import LayerStatistics


@dataclass(frozen=True)
class MSMoE(Grouping):
    """M-SMoE (2310.01334): the most used experts are dominant; every other one joins the dominant
    expert whose router logits over the calibration tokens have the highest cosine similarity to its
    own; a group is weighted by its experts' frequencies. Ties go to the lower expert.

    The paper ranks the experts of all layers together, by frequencies that are divided by their
    layer's highest; here each layer's number is given.
    """

    scored_by = "frequency"

    def scores(self, statistics: LayerStatistics) -> Tensor:
        """How often each expert is used [E]."""
        return frequency(statistics)

    def choose(self, candidates: MergeCandidates) -> Groups:
        """The most used experts, and to each those that are routed alike."""
        statistics, info = candidates.statistics, candidates.statistics.info
        count = frequency(statistics)
        kept = budget.best(info, count, candidates.number)
        similarity = statistics.logit_cosine()
        groups = {target: [target] for target in kept}
        for experts in router_groups(info):
            near = [target for target in kept if target in experts]
            for expert in (expert for expert in experts if expert not in kept):
                groups[near[int(similarity[expert, near].argmax())]].append(expert)
        return grouped(info, count, groups.values(), count)
