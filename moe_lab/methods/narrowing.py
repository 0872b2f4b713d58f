"""Hidden units go, and no experts: the plan of method=prune with method.unit=neurons."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_lab.finite import check_neuron_scores
from moe_lab.methods.metrics.base import Metric
from moe_lab.methods.ratios import neurons
from moe_lab.methods.ratios.budget import Ratio
from moe_lab.methods.ratios.neurons import Neurons, Ranked
from moe_lab.methods.scored import protected_experts
from moe_lab.models.edits.base import Edit
from moe_lab.models.edits.narrow import NarrowExperts
from moe_lab.models.edits.plan import Plan
from moe_lab.models.narrowing import (
    down_proj_name,
    neuron_scores_name,
    neurons_name,
    shared_neurons_name,
)
from moe_lab.option import word_of
from moe_lab.profile.layer import LayerStatistics
from moe_lab.profile.profile import Profile
from moe_lab.profile.propagate import MEASURED, propagated
from moe_lab.types import LayerInfo, UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Narrowing:
    """Keep the hidden units that `metric` scores highest, as many as `ratio` leaves.

    widths: by_layer, all experts of a layer stay equally wide, and each loses its own worst units;
    by_expert, the units of all experts of a layer are ranked together. How many a layer keeps is
    the ratio's: with ratio=uniform the same share of each layer, so that by_layer leaves one width
    for the whole model. shared, propagate, protect, replacement: as of `prune.Prune`.
    """

    metric: Metric
    ratio: Ratio
    widths: str
    shared: bool = False
    propagate: bool = False
    protect: str | None = None
    replacement: str = "nothing"

    def check(self) -> None:
        """Refuse options that hidden units do not know."""
        if self.replacement != "nothing":
            raise UserError(
                f"method.replacement={self.replacement} says what a token gets in the place of an "
                "expert that is gone, and with method.unit=neurons all experts stay: "
                "method.replacement=nothing"
            )
        if self.protect and self.widths == "by_layer":
            raise UserError(
                f"method.protect={self.protect} keeps some experts whole, and with "
                "method.widths=by_layer all experts of a layer are equally wide: "
                "method.widths=by_expert, or method.protect=null"
            )

    def foreseen(self, layers: Sequence[LayerInfo]) -> list[Neurons]:
        """What the ratio can know of the layers before any score."""
        self._check_whole_widths()
        for info in layers:
            if self.shared and not info.shared_neuron_parameters:
                what = "shared experts that are no plain or gated MLP" if info.shared else (
                    "no shared experts"
                )  # fmt: skip
                raise UserError(
                    f"method.shared=true: layer {info.index} has {what}: method.shared=false"
                )
        return [neurons.foreseen_neurons(info, self.widths, self.shared) for info in layers]

    def _check_whole_widths(self) -> None:
        """Refuse what neither a metric nor a ratio of this kind says anything of."""
        if self.shared and not self.metric.scores_shared:
            raise UserError(
                f"method.shared=true: {self.metric.title} has no score of shared experts, which "
                "its paper leaves as they are: method.shared=false, or another metric, such as "
                "metric=energy"
            )
        if self.ratio.decides_widths and (self.shared or self.protect):
            name, without = ("shared", "false") if self.shared else ("protect", "null")
            raise UserError(
                f"method.{name}={word_of(getattr(self, name))}: this ratio says itself how wide "
                f"each routed expert stays: another ratio, or method.{name}={without}"
            )

    def widths_foreseen(self, layers: Sequence[LayerInfo]) -> Mapping[int, int] | None:
        """How wide the experts of each layer stay, by its index; None where scores decide it."""
        return self.ratio.foreseen(self.foreseen(layers)) if self.widths == "by_layer" else None

    def example(self, layers: Sequence[LayerInfo]) -> tuple[Edit, ...]:
        """Edits of the plan's kind; where widths are not known, of two widths."""
        pools, numbers = self.foreseen(layers), self.widths_foreseen(layers)
        edits = []
        for place, (info, pool) in enumerate(zip(layers, pools, strict=True)):
            most, shared = info.expert_width, None
            if numbers is not None:
                widths: tuple[int, ...] = (numbers[info.index],)
                kept_I = pool.shared_kept(numbers[info.index])
                shared = None if kept_I is None else int(kept_I.sum())
            elif self.widths == "by_layer":
                widths = (max(1, most // (1 + place % 2)),)
            else:
                widths = (most, *(max(0, most - 1) for _ in range(pool.experts - 1)))
            edits.append(NarrowExperts(info.index, info.name, widths, shared))
        return tuple(edits)

    def plan(self, profile: Profile) -> Plan:
        """One edit per MoE layer."""
        statistics = profile.statistics
        every = self.metric.ranked_neuron_scores(profile, self.widths)
        of_shared: list[Tensor | None] = [None] * len(every)
        if self.shared:
            of_shared = list(self.metric.shared_neuron_scores(profile))
        protected = protected_experts(self.protect, statistics)
        widths = self._widths(every, profile)
        pools = [
            self._ranked(layer.info, score_EI, shared_I, protected, widths.get(layer.info.index))
            for layer, score_EI, shared_I in zip(statistics, every, of_shared, strict=True)
        ]
        numbers: Mapping[int, int] = {index: int(one.sum()) for index, one in widths.items()}
        numbers = numbers or self.ratio.numbers(pools, profile)
        kept = {pool.index: pool.kept(numbers[pool.index]) for pool, _ in pools}
        refits = {} if self.propagate else self.metric.refits(profile, kept)
        tensors: dict[str, Tensor] = {}
        unseen: dict[str, int] = {}

        def edit(layer: LayerStatistics, score_EI: Tensor, pool: Neurons) -> Edit:
            index = pool.index
            unseen[str(index)] = int((layer["count"] == 0).sum())
            new_EDW = refits.get(index)
            if new_EDW is not None:
                tensors[down_proj_name(index)] = new_EDW
            return narrow_edit(pool, numbers[index], score_EI, tensors, new_EDW is not None)

        def edit_again(layer: LayerStatistics) -> Edit:
            score_EI = self.metric.neuron_score(layer)
            shared_I = self.metric.neuron_score(layer.shared())[0] if self.shared else None
            width_E = widths.get(layer.info.index)
            pool, _ = self._ranked(layer.info, score_EI, shared_I, protected, width_E)
            return edit(layer, score_EI, pool)

        if self.propagate:
            edits = propagated(profile, edit_again, tensors, neurons=True)
        else:
            edits = [
                edit(layer, score_EI, pool)
                for layer, score_EI, (pool, _) in zip(statistics, every, pools, strict=True)
            ]
        notes = {"experts_without_tokens": unseen} | self._notes(pools, numbers, protected)
        return Plan(tuple(edits), notes=notes, tensors=tensors)

    def _widths(self, every: Sequence[Tensor], profile: Profile) -> Mapping[int, Tensor]:
        """How wide each expert stays [E], by layer index; empty where the ratio does not say so."""
        if not self.ratio.decides_widths:
            return {}
        pools = self.foreseen([layer.info for layer in profile.statistics])
        return self.ratio.widths(list(zip(pools, every, strict=True)), profile)

    def _ranked(
        self,
        info: LayerInfo,
        score_EI: Tensor,
        shared_I: Tensor | None,
        protected: Mapping[int, Sequence[int]],
        width_E: Tensor | None = None,
    ) -> Ranked:
        """A layer as the ratio sees it; width_E: with each expert's first so many units first."""
        shape = info.num_experts, info.expert_width
        check_neuron_scores(info.index, shape, score_EI, self.metric.title)
        if shared_I is not None:
            check_neuron_scores(info.index, (info.shared_width,), shared_I, self.metric.title)
        if width_E is not None:
            return neurons.ranked_by_expert(info, score_EI, floor=width_E)
        if self.widths == "by_layer":
            return neurons.ranked_by_layer(info, score_EI, shared_I)
        if whole := list(protected.get(info.index, ())):
            score_EI = score_EI.double().clone()
            score_EI[whole] += score_EI.max() - score_EI.min() + 1
        floor, block = (getattr(self.ratio, name, None) for name in ("floor", "round_to"))
        return neurons.ranked_by_expert(info, score_EI, shared_I, floor or 0, block or 1)

    def _notes(
        self,
        pools: Sequence[Ranked],
        numbers: Mapping[int, int],
        protected: Mapping[int, Sequence[int]],
    ) -> dict[str, Any]:
        layers = [pool for pool, _ in pools]
        notes: dict[str, Any] = {
            "statistics": MEASURED[self.propagate], "unit": "neurons", "widths": self.widths,
        }  # fmt: skip
        if self.protect:
            notes["protected"] = {str(i): list(some) for i, some in protected.items() if some}
        return notes | self.ratio.told(layers, numbers) | self.ratio.notes(pools, numbers)


def narrow_edit(
    pool: Neurons,
    number: int,
    score_EI: Tensor,
    tensors: dict[str, Tensor],
    refitted: bool = False,
) -> NarrowExperts:
    """The edit that leaves a layer `number` of its items; what it needs is put into `tensors`."""
    index, kept_EI, shared_I = pool.index, pool.kept(number), pool.shared_kept(number)
    tensors[neurons_name(index)] = kept_EI.to(torch.uint8)
    tensors[neuron_scores_name(index)] = score_EI.float()
    shared = None
    if shared_I is not None:
        tensors[shared_neurons_name(index)] = shared_I.to(torch.uint8)
        shared = int(shared_I.sum())
    widths = tuple(kept_EI.sum(dim=1).tolist())
    widths = widths[:1] if len(set(widths)) == 1 else widths
    scores = tuple(score_EI.double().sum(dim=1).tolist())
    return NarrowExperts(index, pool.name, widths, shared, refitted, scores)
