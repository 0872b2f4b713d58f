"""HC-SMoE: experts whose mean outputs lie close together become one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, cast

import torch
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform
from torch import Tensor

from moe_lab.methods.grouping.base import Grouping, Groups, MergeCandidates, grouped, router_groups
from moe_lab.methods.metrics.frequency import frequency
from moe_lab.option import Option
from moe_lab.profile.all_experts import AllExperts
from moe_lab.profile.layer import LayerStatistics

LINKAGES = ("average", "complete", "single", "ward")


@torch.no_grad()
def output_distances(experts: AllExperts) -> Tensor:
    """Euclidean distances [E, E] of the experts' outputs, averaged over all tokens, routed or not.

    o_i = 1/T sum_x E_i(x), before any router weight.
    """
    total_ED = torch.zeros(experts.info.num_experts, experts.info.hidden_size).double()
    for chunk in experts.chunks():
        total_ED = total_ED.to(chunk.outputs_ETD.device)
        for total_D, y_TD in zip(total_ED, chunk.outputs_ETD, strict=True):
            total_D += y_TD.sum(dim=0, dtype=torch.float64)  # no copy of all in float64
    mean_ED = total_ED.cpu() / experts.num_tokens
    # Not by way of inner products, whose differences would hide small distances.
    return torch.cdist(mean_ED, mean_ED, compute_mode="donot_use_mm_for_euclid_dist")


def clusters(distance_EE: Tensor, number: int, method: str) -> list[list[int]]:
    """Hierarchical clustering into exactly `number` clusters, also where distances are equal."""
    size = len(distance_EE)
    members = {expert: [expert] for expert in range(size)}
    if number < size:
        steps = hierarchy.linkage(squareform(distance_EE.numpy(), checks=False), method)
        for step, (one, other) in enumerate(steps[: size - number, :2].astype(int).tolist()):
            members[size + step] = members.pop(one) + members.pop(other)
    return list(members.values())


@dataclass(frozen=True)
class HCSMoE(Grouping):
    """HC-SMoE (2410.08589): hierarchical clustering of the experts by the Euclidean distances of
    their mean outputs o_i, with average linkage; each cluster becomes its average, weighted by
    frequencies, without alignment, and all its router rows lead there.

    The expert that gives its place (and with method.router=dominant its row) is the most used one.
    """

    linkage: Annotated[
        str, Option("how far clusters are from each other; average: the paper's", among=LINKAGES)
    ] = "average"

    align = "none"
    needs_outputs = True
    outputs_options = ()
    scored_by = "frequency"

    def scores(self, statistics: LayerStatistics) -> Tensor:
        """How often each expert is used [E]."""
        return frequency(statistics)

    def outputs(self, experts: AllExperts) -> Tensor:
        """The distances [E, E] of the mean outputs."""
        return output_distances(experts)

    def choose(self, candidates: MergeCandidates) -> Groups:
        """The clusters of each router group."""
        info, count = candidates.statistics.info, frequency(candidates.statistics)
        distance_EE = cast(Tensor, candidates.outputs_EE)  # given: it needs outputs
        chosen = []
        for experts in router_groups(info):
            part = distance_EE[experts.start : experts.stop, experts.start : experts.stop]
            for cluster in clusters(part, candidates.number // info.groups, self.linkage):
                chosen.append([experts.start + expert for expert in cluster])
        return grouped(info, count, chosen, count)
