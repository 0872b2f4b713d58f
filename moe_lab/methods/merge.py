"""M-SMoE: experts of a layer that are routed alike become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_lab.evidence import Evidence
from moe_lab.layer_choice import check_layers, choose_layers
from moe_lab.moe import check_kept
from moe_lab.statistics import LayerStatistics
from moe_lab.types import Edit, LayerInfo, Plan, UserError

ORDERS = ("all", "cosine", "first", "last", "random")
ROUTERS = ("dominant", "mean")


@dataclass(frozen=True)
class Merge:
    """Merge the experts of `num_layers` layers into `num_experts` each.

    M-SMoE (2310.01334): the most frequently used experts of a layer are dominant; every other one
    joins the dominant expert whose router logits over the calibration tokens have the highest
    cosine similarity to its own; a group becomes the average of its experts, weighted by their
    frequencies, after their hidden units were permuted to match the dominant expert's (align).
    Where a router works on groups of experts, each keeps the same number and merges its own.

    Two differences: dominant experts are chosen within each layer, and a merged expert keeps one
    router row (the dominant expert's, or with router=mean the weighted mean of its group's), since
    stock models cannot send several rows to one expert. So a merge of identical experts computes
    the same expert exactly, but the router gives it what pruning the others would give.

    layers: all (num_layers does not count), cosine (those whose MoE changes the hidden state
    least), first, last, random (by seed), or an explicit list of decoder layers.
    """

    num_layers: int
    num_experts: int
    layers: str | Sequence[int] = "cosine"
    align: str = "weights"
    router: str = "dominant"
    seed: int = 0

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse layers and options that do not exist, and a router left with too few experts."""
        check_layers("merge", self.layers, self.num_layers, ORDERS, layers)
        if self.router not in ROUTERS:
            raise UserError(
                f"method.router={self.router!r} does not exist; there are {', '.join(ROUTERS)}"
            )
        for info in layers:
            if isinstance(self.layers, str) or info.index in self.layers:
                self._check_number(info)

    def _check_number(self, info: LayerInfo) -> None:
        if self.num_experts >= info.num_experts:
            raise UserError(
                f"method.num_experts={self.num_experts}: layer {info.index} has "
                f"{info.num_experts} experts, and fewer must stay for any to be merged"
            )
        try:
            check_kept(info, self.num_experts)
        except UserError as error:
            raise UserError(f"method.num_experts={self.num_experts} is too few: {error}") from error

    def identity(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options that the plan depends on: the seed only where something is random."""
        seeded = self.layers == "random"
        return {name: value for name, value in options.items() if seeded or name != "seed"}

    def plan(self, evidence: Evidence) -> Plan:
        """One edit per MoE layer, its scores the experts' frequencies."""
        statistics = evidence.statistics
        order = choose_layers(self.layers, self.num_layers, statistics, "layer", self.seed)
        edits = tuple(
            self._edit(one)
            if one.info.index in order
            else Edit(one.info.index, one.info.name, "keep")
            for one in statistics
        )
        unseen = {str(one.info.index): int((one["count"] == 0).sum()) for one in statistics}
        notes = {
            "statistics": "intact model",
            "scores": "tokens that the router sent to each expert",
            "experts_without_tokens": unseen,
        }
        return Plan(edits, layer_order=order, notes=notes)

    def _edit(self, statistics: LayerStatistics) -> Edit:
        info, count = statistics.info, statistics["count"]
        kept = dominant_experts(info, count, self.num_experts)
        groups = groups_of(info, statistics.logit_cosine(), kept)
        return Edit(
            info.index,
            info.name,
            "merge",
            kept=kept,
            scores=tuple(count.tolist()),
            groups=groups,
            weights=tuple(_shares(count[list(group)]) for group in groups),
            align=self.align,
            router=self.router,
        )


def dominant_experts(info: LayerInfo, count: Tensor, num_experts: int) -> tuple[int, ...]:
    """The most used experts, the same number of each router group, ascending; ties the lower."""
    size = info.num_experts // info.groups
    order = count.view(info.groups, size).argsort(dim=1, descending=True, stable=True)
    best = order[:, : num_experts // info.groups] + torch.arange(info.groups)[:, None] * size
    return tuple(sorted(best.flatten().tolist()))


def groups_of(
    info: LayerInfo, similarity: Tensor, kept: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """For each kept expert the experts that become it: itself first, then ascending.

    The others join the most similar kept expert of their own router group; ties the lower.
    """
    size = info.num_experts // info.groups
    groups = {target: [target] for target in kept}
    for expert in sorted(set(range(info.num_experts)) - set(kept)):
        near = [target for target in kept if target // size == expert // size]
        best = int(similarity[expert, near].argmax())
        groups[near[best]].append(expert)
    return tuple(tuple(group) for group in groups.values())


def _shares(count: Tensor) -> tuple[float, ...]:
    total = count.sum()
    # A group that saw no token has no frequencies: its experts count alike.
    share = count / total if total > 0 else torch.full_like(count, 1 / len(count))
    return tuple(share.tolist())
