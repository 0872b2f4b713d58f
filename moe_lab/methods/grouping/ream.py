"""REAM: the experts that REAP would keep take in the others, the most important ones first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_lab.methods.grouping.base import (
    Grouping,
    Groups,
    MergeCandidates,
    experts_by_score,
    grouped,
    router_groups,
)
from moe_lab.methods.metrics.reap import reap
from moe_lab.models.routers import SCORINGS, scoring
from moe_lab.option import Option
from moe_lab.profile.all_experts import AllExperts
from moe_lab.profile.layer import LayerStatistics
from moe_lab.types import LayerInfo, UserError


@torch.no_grad()
def gated_cosine(experts: AllExperts) -> Tensor:
    """Cosine [E, E] of the experts' gated outputs, averaged over all tokens, routed or not.

    o_i = 1/T sum_x p_i(x) E_i(x), with the router's full probability p (softmax where its scoring
    is none that we know); 0 for outputs of zeros.
    """
    score = SCORINGS[scoring(experts.layer) or "softmax"]
    total_ED = torch.zeros(experts.info.num_experts, experts.info.hidden_size).double()
    for chunk in experts.chunks():
        probability_ET = score(chunk.logits_TE.double()).T
        total_ED = total_ED.to(probability_ET.device)
        for total_D, probability_T, y_TD in zip(
            total_ED, probability_ET, chunk.outputs_ETD, strict=True
        ):
            total_D += probability_T @ y_TD.double()
    unit_ED = F.normalize(total_ED.cpu(), dim=1)
    return unit_ED @ unit_ED.T


def logit_similarity(statistics: LayerStatistics) -> Tensor:
    """1 - d / max d [E, E], with d the distance of the experts' router logits over all tokens, each
    expert's divided by their norm: d = sqrt(2 - 2 cos)."""
    distance = (2 - 2 * statistics.logit_cosine()).clamp(min=0).sqrt().fill_diagonal_(0)
    return 1 - distance / distance.max() if distance.max() > 0 else torch.ones_like(distance)


def assigned(
    order: Sequence[int], number: int, similarity: Tensor, group_size: int
) -> list[list[int]]:
    """Pseudo-pruning: the first `number` of `order` are centroids; each in turn takes the most
    similar of the experts that are left, until its group has `group_size` (ties: the lower)."""
    centroids, left = order[:number], sorted(order[number:])
    groups = []
    for centroid in centroids:
        distances = (-similarity[centroid]).tolist()
        nearest = sorted(left, key=distances.__getitem__)
        taken = nearest[: group_size - 1]
        left = [expert for expert in left if expert not in taken]
        groups.append([centroid, *taken])
    return groups


def _weight(score: Tensor) -> Tensor:
    used = score > 0
    if not used.any():
        return score
    return torch.where(used, score, score[used].min().clamp(max=0.5))


@dataclass(frozen=True)
class Ream(Grouping):
    """REAM (2604.04356): the experts with the highest REAP scores are centroids. From the highest
    on, each takes the most similar experts that no other has taken, until its group has
    `group_size`, so that the last centroids stay as they are: pseudo-pruning. Similarity is the
    mean of two: (1 + cosine of the mean gated outputs) / 2, and that of router logits. A group is
    weighted by its scores; unused experts get the lowest score above 0, at most 0.5. Hidden units
    are matched by activations and weights (align=both), the centroid's router row stays
    (router=dominant), and layers are measured behind the merged ones before (propagate).

    Where the official code differs from the paper's formulas, these are followed: its REAP score
    applies the gate twice when similarities are gated, and is a mean of means of batches; it draws
    different tokens for the activations of each expert, and reduces weights to 64 principal
    components before matching. The probability is the router's own, there always a softmax.
    """

    group_size: Annotated[int, Option("the most experts that become one", least=2)] = 16

    align = "both"
    router = "dominant"
    propagate = True
    needs_outputs = True
    outputs_options = ()
    scored_by = "reap"

    def check(self, info: LayerInfo, number: int) -> None:
        """Refuse groups too small to take in all experts."""
        super().check(info, number)
        if number * self.group_size < info.num_experts:
            least = -(-info.num_experts // number)
            raise UserError(
                f"grouping.group_size={self.group_size}: {number} groups of layer {info.index} "
                f"cannot take in its {info.num_experts} experts; at least {least} is possible"
            )

    def scores(self, statistics: LayerStatistics) -> Tensor:
        """REAP's [E]."""
        return reap(statistics)

    def outputs(self, experts: AllExperts) -> Tensor:
        """The cosines [E, E] of the gated outputs."""
        return gated_cosine(experts)

    def choose(self, candidates: MergeCandidates) -> Groups:
        """The centroids of each router group, with those that they take in."""
        statistics, info = candidates.statistics, candidates.statistics.info
        score = reap(statistics)
        cosine_EE = cast(Tensor, candidates.outputs_EE)  # given: it needs outputs
        similarity = ((1 + cosine_EE) / 2 + logit_similarity(statistics)) / 2
        order, number = experts_by_score(info, score), candidates.number // info.groups
        groups = []
        for experts in router_groups(info):
            own = [expert for expert in order if expert in experts]
            groups += assigned(own, number, similarity, self.group_size)
        return grouped(info, score, groups, _weight(score))
