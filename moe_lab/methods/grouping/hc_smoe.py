"""HC-SMoE: experts whose mean outputs lie close together become one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from moe_lab.methods.grouping.base import Grouping, Groups, MergeCandidates, grouped, router_groups
from moe_lab.methods.metrics.frequency import frequency
from moe_lab.profile.all_experts import AllExperts
from moe_lab.types import LayerInfo, UserError

LINKAGES = ("average", "complete", "single", "ward")


@torch.no_grad()
def output_distances(experts: AllExperts) -> Tensor:
    """Euclidean distances [E, E] of the experts' outputs, averaged over all tokens, routed or not.

    o_i = 1/T sum_x E_i(x), before any router weight.
    """
    total_ED = torch.zeros(experts.info.num_experts, experts.info.hidden_size).double()
    for chunk in experts.chunks():
        for total_D, y_TD in zip(total_ED, chunk.outputs_ETD, strict=True):
            total_D += y_TD.sum(dim=0, dtype=torch.float64).cpu()  # no copy of all in float64
    mean_ED = total_ED / experts.num_tokens
    # Not by way of inner products, whose differences would hide small distances.
    return torch.cdist(mean_ED, mean_ED, compute_mode="donot_use_mm_for_euclid_dist")


def clusters(distance_EE: Tensor, number: int, method: str) -> list[list[int]]:
    """Hierarchical clustering into exactly `number` clusters, also where distances are equal."""
    size = len(distance_EE)
    members = {expert: [expert] for expert in range(size)}
    if number < size:
        steps = linkage(squareform(distance_EE.numpy(), checks=False), method)
        for step, (one, other) in enumerate(steps[: size - number, :2].astype(int).tolist()):
            members[size + step] = members.pop(one) + members.pop(other)
    return list(members.values())


def choose(candidates: MergeCandidates) -> Groups:
    """HC-SMoE (2410.08589): hierarchical clustering of the experts by the Euclidean distances of
    their mean outputs o_i, with average linkage (others by method.linkage); each cluster becomes
    its average, weighted by frequencies, without alignment, and all its router rows lead there.

    The expert that gives its place (and with method.router=dominant its row) is the most used one.
    """
    info, count = candidates.statistics.info, frequency(candidates.statistics)
    distance_EE = cast(Tensor, candidates.outputs_EE)  # given: GROUPING has `outputs`
    chosen = []
    for experts in router_groups(info):
        part = distance_EE[experts.start : experts.stop, experts.start : experts.stop]
        for cluster in clusters(part, candidates.number // info.groups, candidates.linkage):
            chosen.append([experts.start + expert for expert in cluster])
    return grouped(info, count, chosen, count)


def check(info: LayerInfo, number: int, options: Mapping[str, Any]) -> None:
    """Refuse a linkage that does not exist."""
    if options["linkage"] not in LINKAGES:
        raise UserError(
            f"method.linkage={options['linkage']!r} does not exist; there are {', '.join(LINKAGES)}"
        )


GROUPING = Grouping(
    choose,
    frequency,
    align="none",
    router="all",
    outputs=output_distances,
    check=check,
    options=("linkage",),
)
