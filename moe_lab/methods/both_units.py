"""Experts and hidden units go, and bits: the plan of method=prune with method.unit=both."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from moe_lab.finite import check_neuron_scores
from moe_lab.methods.metrics.base import Metric
from moe_lab.methods.narrowing import narrow_edit
from moe_lab.methods.ratios.budget import Ratio, floor_of
from moe_lab.methods.ratios.neurons import ranked_by_layer
from moe_lab.methods.ratios.pairs import LayerUnits, Pairs
from moe_lab.models.edits.base import Edit
from moe_lab.models.edits.keep import KeepLayer
from moe_lab.models.edits.narrow import NarrowExperts
from moe_lab.models.edits.plan import Plan
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.profile.profile import Profile
from moe_lab.profile.propagate import MEASURED
from moe_lab.types import LayerInfo


@dataclass(frozen=True)
class BothUnits:
    """Drop whole experts where that costs less than narrowing all of them, by one budget in bytes.

    An expert's score is the sum of its hidden units'. How many experts a layer keeps, and how wide,
    are those with the least sum of measured errors (`Sensitivity.pairs`).
    """

    metric: Metric
    ratio: Ratio

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse other ratios, which measure nothing, and an impossible budget."""
        self.ratio.check_pairs(layers)

    def example(self, layers: Sequence[LayerInfo]) -> tuple[Edit, ...]:
        """Edits of the plan's kind, of different numbers."""
        edits: list[Edit] = []
        for place, info in enumerate(layers):
            number = info.num_experts if place % 2 else floor_of(info, None)
            edits.append(PruneExperts(info.index, info.name, tuple(range(number))))
            edits.append(NarrowExperts(info.index, info.name, (max(1, info.expert_width - 1),)))
        return tuple(edits)

    def plan(self, profile: Profile) -> Plan:
        """Two edits per MoE layer, as far as something goes."""
        layers = [layer.info for layer in profile.statistics]
        scores = list(zip(layers, self.metric.neuron_scores(profile), strict=True))
        for info, score_EI in scores:
            shape = info.num_experts, info.expert_width
            check_neuron_scores(info.index, shape, score_EI, self.metric.title)
        pairs = self.ratio.pairs(scores, profile)
        tensors: dict[str, Tensor] = {}
        edits = [edit for info, score in scores for edit in _edits(info, score, pairs, tensors)]
        seen = {str(one.info.index): int((one["count"] == 0).sum()) for one in profile.statistics}
        notes = {
            "experts_without_tokens": seen, "statistics": MEASURED[False], "unit": "both",
            "kept_per_layer": {str(i): f"{n} x {w}" for i, (n, w, *_) in pairs.items()},
        }  # fmt: skip
        return Plan(tuple(edits), notes=notes | pairs.found, tensors=tensors)


def _edits(
    info: LayerInfo, score_EI: Tensor, pairs: Pairs, tensors: dict[str, Tensor]
) -> list[Edit]:
    number, width = pairs[info.index][:2]
    left = list(LayerUnits(info, score_EI, (), ()).experts(number))
    made: list[Edit] = []
    if number < info.num_experts:
        scores = tuple(score_EI.double().sum(dim=1).tolist())
        made.append(PruneExperts(info.index, info.name, tuple(left), scores=scores))
    if width < info.expert_width:
        pool, _ = ranked_by_layer(dataclasses.replace(info, num_experts=number), score_EI[left])
        made.append(narrow_edit(pool, width, score_EI[left], tensors))
    return made or [KeepLayer(info.index, info.name)]
