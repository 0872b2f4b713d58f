"""Expert pruning: the least important experts of each layer go, with their router rows.

Or the least important hidden units of its experts, which all stay (`narrowing.py`).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, cast, get_args

import torch
from torch import Tensor

from moe_lab.finite import check_scores
from moe_lab.lookup import require_kind
from moe_lab.methods.base import LmHead, Mtp, form_notes
from moe_lab.methods.both_units import BothUnits
from moe_lab.methods.metrics.base import WIDTHS, names_of_unit
from moe_lab.methods.narrowing import Narrowing
from moe_lab.methods.ratios import budget
from moe_lab.methods.ratios.budget import Ratio, Scores
from moe_lab.methods.refit import Refitting
from moe_lab.methods.scored import ByScores, protected_experts
from moe_lab.models.editing import constants_name
from moe_lab.models.edits.base import Edit
from moe_lab.models.edits.plan import Plan
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.models.layers import check_own_rows
from moe_lab.option import Option, word_of
from moe_lab.profile.layer import LayerStatistics
from moe_lab.profile.profile import Profile
from moe_lab.profile.propagate import MEASURED, propagated
from moe_lab.types import LayerInfo, ReplacementName, UserError

logger = logging.getLogger(__name__)
PROTECTIONS = ("super_experts", "outliers")
PRUNED = ("experts", "neurons", "both")


@dataclass(frozen=True)
class Prune(Refitting, ByScores):
    """Keep the experts that `metric` scores highest, as many as `ratio` leaves.

    With a replacement the router stays whole, and a token sent to a removed expert gets zero, a
    constant (MoNE's novice 2507.00390: the expert's mean output over the tokens sent to it; zero
    for one that saw none), or a copy of its own state (the zero-computation experts of MoE++
    2410.07348), times the router's weight. Super experts are those of the intact model
    (`collect.super_experts`). With propagate scores and constants are measured again; how many
    experts each layer keeps is still decided by the intact model.
    """

    replacement: Annotated[
        str,
        Option(
            "what takes a removed expert's place; nothing: its router row goes too",
            among=get_args(ReplacementName),
        ),
    ] = "nothing"
    protect: Annotated[
        str | None,
        Option(
            "which stay whatever their score; outliers: also in the last quarter of the layers",
            among=PROTECTIONS,
        ),
    ] = None
    propagate: Annotated[
        bool, Option("measure each layer behind the layers that are pruned already")
    ] = False
    unit: Annotated[
        str,
        Option("what goes: whole experts, hidden units of all of them, or both", among=PRUNED),
    ] = "experts"
    widths: Annotated[
        str | None,
        Option(
            "of unit=neurons: whether all experts of a layer stay equally wide; null: as the "
            "metric's paper ranks neurons",
            among=WIDTHS,
        ),
    ] = None
    shared: Annotated[bool, Option("of unit=neurons: the shared experts get narrower, too")] = False
    padding: Annotated[
        float | None,
        Option(
            "largest share of zeros with which stock transformers may hold the result; null: the "
            "model's own, or 0.01",
            least=0,
        ),
    ] = None
    mtp: Mtp = "prune"
    lm_head: LmHead = "auto"

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse a ratio with which a router cannot work, what the metric refuses, and options."""
        super().check(layers)
        self._check_unit()
        self._check_together()
        for info in layers:
            check_own_rows(info)
        ratio = require_kind("ratio", self.ratio, Ratio)
        if self.unit == "both":
            self._both.check(layers)
        else:
            ratio.check(self._narrowing.foreseen(layers) if self.of_neurons else layers)
        self._metric.check(layers)

    def _check_unit(self) -> None:
        """Refuse a metric of another unit, and options of neurons where none go."""
        unit = "neurons" if self.of_neurons else "experts"
        if unit not in self._metric.units:
            other = " or ".join(f"method.unit={unit}" for unit in self._metric.units)
            raise UserError(
                f"method.unit={self.unit}: {self._metric.title} has no score of them ({other}); "
                f"metric={', '.join(names_of_unit(unit))} have"
            )
        if self.unit == "both":
            self._check_both()
        elif self.of_neurons:
            self._narrowing.check()
        elif self.widths is not None or self.shared:
            name = "widths" if self.widths is not None else "shared"
            raise UserError(
                f"method.{name}={word_of(getattr(self, name))} says how hidden units go, and "
                "method.unit=experts removes whole experts: ask for method.unit=neurons, too"
            )

    def _check_both(self) -> None:
        """Refuse options that are of one unit alone."""
        given = {
            "widths": self.widths not in (None, "by_layer"), "shared": self.shared,
            "protect": self.protect is not None, "propagate": self.propagate,
            "replacement": self.replacement != "nothing",
        }  # fmt: skip
        if asked := [name for name, is_given in given.items() if is_given]:
            value = word_of(getattr(self, asked[0]))
            raise UserError(
                f"method.{asked[0]}={value} is not possible with method.unit=both: choose "
                "method.unit=neurons or method.unit=experts"
            )

    def _check_together(self) -> None:
        """Refuse options that a metric makes impossible."""
        if self.propagate and self._metric.needs_model:
            raise UserError(
                "method.propagate=true measures a layer's statistics again behind the compressed "
                "ones, and this metric looks at the intact model itself: choose a metric of "
                "statistics, such as metric=reap, or method.propagate=false"
            )
        if self.protect and self._metric.judges_sets:
            raise UserError(
                f"method.protect={self.protect} lifts scores, and this metric chooses sets of "
                "experts without them: choose another metric, or method.protect=null"
            )

    def example(self, layers: Sequence[LayerInfo]) -> tuple[Edit, ...]:
        """Edits of the plan's kind; how many experts go is not known, so that none does."""
        return self.followed(self._example(layers), layers)

    def _example(self, layers: Sequence[LayerInfo]) -> tuple[Edit, ...]:
        if self.unit == "both":
            return self._both.example(layers)
        if self.of_neurons:
            return self._narrowing.example(layers)
        return tuple(
            PruneExperts(
                info.index, info.name, kept=tuple(range(info.num_experts)),
                replacement=self._replacement,
            )
            for info in layers
        )  # fmt: skip

    def foresees_form(self, layers: Sequence[LayerInfo]) -> bool:
        """Not where scores decide how wide experts stay."""
        if self.unit == "both":
            return False
        return not self.of_neurons or self._narrowing.widths_foreseen(layers) is not None

    def foreseen(self, layers: Sequence[LayerInfo]) -> Mapping[int, int] | None:
        """What the ratio leaves of the experts, where no score enters it."""
        return None if self.of_neurons else self.ratio.foreseen(layers)

    @property
    def of_neurons(self) -> bool:
        """Whether hidden units go."""
        return self.unit != "experts"

    @property
    def _both(self) -> BothUnits:
        return BothUnits(self._metric, self.ratio)

    @property
    def _narrowing(self) -> Narrowing:
        widths = self.widths or self._metric.widths
        return Narrowing(
            self._metric, self.ratio, widths, self.shared, self.propagate, self.protect,
            self.replacement,
        )  # fmt: skip

    @property
    def from_routers(self) -> bool:
        """Whether the routers' statistics are enough."""
        more = self.replacement == "constant" or self.protect is not None or self.of_neurons
        return not more and self._metric.from_routers

    @property
    def decides_bits(self) -> bool:
        """Where its ratio does."""
        return self.ratio.decides_bits

    @property
    def takes_groups(self) -> bool:
        """Whether a plan for a group's statistics is one for that group, and can be evaluated."""
        whole = self.propagate or self.replacement != "nothing" or self.shared or self.refit
        return not whole and self._metric.takes_groups and self.ratio.takes_groups

    @property
    def _replacement(self) -> ReplacementName:
        return cast(ReplacementName, self.replacement)  # `check` has refused all others

    def decide(self, profile: Profile) -> Plan:
        """One pruning edit per MoE layer."""
        if self.of_neurons:
            made = (self._both if self.unit == "both" else self._narrowing).plan(profile)
            return dataclasses.replace(made, notes=made.notes | form_notes(self.padding))
        layers = [layer.info for layer in profile.statistics]
        measured = list(zip(layers, self._metric.scores(profile), strict=True))
        for info, score_E in measured:
            check_scores(info.index, info.num_experts, score_E, self._metric.title)
        protected = protected_experts(self.protect, profile.statistics)
        if self.protect and not any(protected.values()):
            logger.info(
                "method.protect=%s protects nothing: the model has no such expert", self.protect
            )
        scores = lifted(measured, protected)
        numbers = self.ratio.numbers(scores, profile)
        _check_protected(layers, protected, numbers)
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
            score = self._metric.score(layer)
            check_scores(layer.info.index, len(score), score, self._metric.title)
            [(info, above)] = lifted([(layer.info, score)], protected)
            return edit(layer, score, budget.best(info, above, numbers[info.index]))

        if self.propagate:
            edits = propagated(profile, edit_again, tensors)
        else:
            chosen = self._metric.choose(profile, numbers)
            kept = budget.kept(scores, numbers) if chosen is None else chosen
            edits = [
                edit(layer, score, kept[info.index])
                for layer, (info, score) in zip(profile.statistics, measured, strict=True)
            ]
        notes = {"experts_without_tokens": unseen} | self._notes(scores, numbers, protected)
        notes |= form_notes(self.padding)
        return Plan(tuple(edits), notes=notes, tensors=tensors)

    def _notes(
        self, scores: Scores, numbers: Mapping[int, int], protected: Mapping[int, Sequence[int]]
    ) -> dict[str, Any]:
        """What the plan says of its decision."""
        notes: dict[str, Any] = {"statistics": MEASURED[self.propagate]}
        if self.protect:
            notes["protected"] = {str(i): list(some) for i, some in protected.items() if some}
        layers = [info for info, _ in scores]
        notes |= self.ratio.told(layers, numbers) | self.ratio.notes(scores, numbers)
        return notes | self._metric.notes(layers, numbers)


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
