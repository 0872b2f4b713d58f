"""Expert pruning: the least important experts of each layer go, with their router rows."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

import torch
from torch import Tensor

from moe_lab.methods.base import Metric
from moe_lab.methods.ratios import budget
from moe_lab.methods.ratios.budget import Ratio, Scores
from moe_lab.models import activations, editing, stream
from moe_lab.models import layers as model_layers
from moe_lab.models.editing import constants_name
from moe_lab.models.edits.base import Edit
from moe_lab.models.edits.plan import Plan
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.models.layers import check_own_rows
from moe_lab.profile import collect, propagate
from moe_lab.profile.collect import super_experts
from moe_lab.profile.layer import LayerStatistics
from moe_lab.profile.profile import Profile
from moe_lab.profile.propagate import propagated
from moe_lab.types import LayerInfo, ReplacementName, UserError

PROTECTIONS = ("super_experts", "outliers")


@dataclass(frozen=True)
class Prune:
    """Keep the experts that `metric` scores highest, as many as `ratio` leaves.

    replacement: what takes a removed expert's place. nothing: its router row goes too. Else the
    router stays whole, and a token sent there gets zero, a constant (MoNE's novice 2507.00390: the
    expert's mean output over the tokens sent to it; zero for one that saw none), or a copy of its
    own state (the zero-computation experts of MoE++ 2410.07348), times the router's weight.
    protect: super_experts, which stay whatever their score (`collect.super_experts`, of the
    intact model), or outliers, those of the last quarter of the layers too.
    propagate: each layer's scores and constants are measured behind the layers that are pruned
    already; how many experts each keeps is still decided by the intact model.
    """

    metric: Metric
    ratio: Ratio
    replacement: str = "nothing"
    protect: str | None = None
    propagate: bool = False

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse a ratio with which a router cannot work, what the metric refuses, and options."""
        self._check_options()
        for info in layers:
            check_own_rows(info)
        self.ratio.check(layers)
        if hasattr(self._metric, "check"):
            self._metric.check(layers)

    def _check_options(self) -> None:
        possible = {"replacement": get_args(ReplacementName), "protect": (None, *PROTECTIONS)}
        for name, values in possible.items():
            if getattr(self, name) not in values:
                words = ", ".join("null" if value is None else value for value in values)
                raise UserError(f"method.{name}={getattr(self, name)}: there are {words}")
        if self.propagate and hasattr(self._metric, "scores"):
            raise UserError(
                "method.propagate=true measures a layer's statistics again behind the compressed "
                "ones, and this metric looks at the intact model itself: choose a metric of "
                "statistics, such as metric=reap, or method.propagate=false"
            )
        if self.protect and hasattr(self._metric, "choose"):
            raise UserError(
                f"method.protect={self.protect} lifts scores, and this metric chooses sets of "
                "experts without them: choose another metric, or method.protect=null"
            )

    def example(self, layers: Sequence[LayerInfo]) -> tuple[Edit, ...]:
        """Edits of the plan's kind; how many experts go is not known, so that none does."""
        return tuple(
            PruneExperts(
                info.index, info.name, kept=tuple(range(info.num_experts)),
                replacement=self._replacement,
            )
            for info in layers
        )  # fmt: skip

    @property
    def from_routers(self) -> bool:
        """Whether the routers' statistics are enough."""
        more = self.replacement == "constant" or self.protect is not None
        return not more and getattr(self._metric, "from_routers", False)

    @property
    def takes_groups(self) -> bool:
        """Whether a plan for a group's statistics is one for that group, and can be evaluated."""
        whole = self.propagate or self.replacement != "nothing"
        return not whole and all(
            getattr(part, "takes_groups", True) for part in (self._metric, self.ratio)
        )

    @property
    def _metric(self) -> Metric:
        """The metric itself, where the config bound some of its arguments."""
        return self.metric.func if isinstance(self.metric, functools.partial) else self.metric

    @property
    def _replacement(self) -> ReplacementName:
        return cast(ReplacementName, self.replacement)  # `check` has refused all others

    def identity(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options, with a reference checkpoint's content in the place of its path."""
        if hasattr(self.ratio, "identity"):
            options = options | {"ratio": self.ratio.identity(options["ratio"])}
        fingerprint = getattr(self._metric, "fingerprint", None)
        if fingerprint is None:
            return options
        named = {key: value for key, value in options["metric"].items() if key != "reference"}
        return options | {"metric": named | {"fingerprint": fingerprint}}

    def plan(self, profile: Profile) -> Plan:
        """One pruning edit per MoE layer."""
        measured = self._scores(profile)
        protected = self._protected(profile.statistics)
        scores = lifted(measured, protected)
        numbers = self.ratio.numbers(scores, profile)
        _check_protected([info for info, _ in scores], protected, numbers)
        tensors: dict[str, Tensor] = {}
        unseen: dict[str, int] = {}

        def edit(layer: LayerStatistics, score_E: Tensor, kept: tuple[int, ...]) -> Edit:
            index, name = layer.info.index, layer.info.name
            unseen[str(index)] = int((layer["count"] == 0).sum())
            if self.replacement == "constant" and len(kept) < layer.info.num_experts:
                tensors[constants_name(index)] = mean_outputs(layer, kept)
            scores = tuple(score_E.tolist())
            return PruneExperts(index, name, kept, self._replacement, scores)

        def edit_again(layer: LayerStatistics) -> Edit:
            score = self.metric(layer)
            [(info, above)] = lifted([(layer.info, score)], protected)
            return edit(layer, score, budget.best(info, above, numbers[info.index]))

        if self.propagate:
            edits = propagated(profile, edit_again, tensors)
        else:
            kept = budget.kept(scores, numbers)
            if hasattr(self._metric, "choose"):
                kept = self._metric.choose(profile, numbers)
            edits = [
                edit(layer, score, kept[info.index])
                for layer, (info, score) in zip(profile.statistics, measured, strict=True)
            ]
        notes = {"experts_without_tokens": unseen} | self._notes(scores, numbers, protected)
        return Plan(tuple(edits), notes=notes, tensors=tensors)

    def _protected(self, layers: list[LayerStatistics]) -> dict[int, tuple[int, ...]]:
        """The experts that stay in any case, by layer index."""
        if self.protect == "outliers":
            return super_experts(layers, include_last=True)
        return super_experts(layers) if self.protect else {}

    def _notes(
        self, scores: Scores, numbers: Mapping[int, int], protected: Mapping[int, Sequence[int]]
    ) -> dict[str, Any]:
        """What the plan says of its decision."""
        notes: dict[str, Any] = {"statistics": propagate.MEASURED[self.propagate]}
        if self.protect:
            notes["protected"] = {str(i): list(some) for i, some in protected.items() if some}
        if hasattr(self.ratio, "notes"):
            notes |= self.ratio.notes(scores, numbers)
        if hasattr(self._metric, "notes"):
            notes |= self._metric.notes([info for info, _ in scores], numbers)
        return notes

    def _scores(self, profile: Profile) -> Scores:
        layers = profile.statistics
        if hasattr(self._metric, "scores"):
            by_layer = self._metric.scores(profile)
        else:
            by_layer = [self.metric(layer) for layer in layers]
        return list(zip((layer.info for layer in layers), by_layer, strict=True))

    def code(self) -> list[object]:
        """What decides the plan beside this class."""
        parts = [self._metric, self.ratio]
        further = [part.code() for part in parts if hasattr(part, "code")]
        edits = [PruneExperts, editing, model_layers]
        again = [propagate, *edits, stream, activations] if self.propagate else []
        return [
            self.metric, self.ratio, budget, collect, *again,
            *itertools.chain.from_iterable(further),
        ]  # fmt: skip


def lifted(scores: Scores, protected: Mapping[int, Sequence[int]]) -> Scores:
    """The scores, those of protected experts just above all others of all these layers."""
    if not any(protected.values()):
        return scores
    highest = torch.stack([score_E.double().max() for _, score_E in scores]).max()
    above = torch.nextafter(highest, torch.full_like(highest, torch.inf))
    raised = []
    for info, score_E in scores:
        changed_E = score_E.double().clone()
        changed_E[list(protected.get(info.index, ()))] = above
        raised.append((info, changed_E))
    return raised


def _check_protected(
    layers: Sequence[LayerInfo],
    protected: Mapping[int, Sequence[int]],
    numbers: Mapping[int, int],
) -> None:
    """Refuse to keep more protected experts than stay, of a layer or of one of its groups."""
    for info in layers:
        some, size = protected.get(info.index, ()), info.num_experts // info.groups
        most = max(sum(e // size == group for e in some) for group in range(info.groups))
        room = numbers[info.index] // info.groups
        if most > room:
            where = "" if info.groups == 1 else " of one group"
            raise UserError(
                f"method.protect: layer {info.index} has {most} super experts{where} "
                f"({list(some)}), and the ratio leaves {room}: remove fewer experts, or set "
                "method.protect=null"
            )


def mean_outputs(layer: LayerStatistics, kept: Sequence[int]) -> Tensor:
    """The mean output [R, D] of each of the R experts that go, over the tokens sent to it."""
    gone = sorted(set(range(layer.info.num_experts)) - set(kept))
    count = layer["count"][gone].clamp(min=1)
    return layer["output_sum"][gone] / count[:, None]
