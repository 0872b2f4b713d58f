"""Merging: several experts of a layer become one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

import torch
from torch import Tensor

from moe_lab.methods.grouping import alignment, base
from moe_lab.methods.grouping.alignment import permutation
from moe_lab.methods.grouping.base import (
    Grouping,
    Groups,
    MergeCandidates,
    grouping_named,
    grouping_names,
)
from moe_lab.methods.layer_choice import check_layers, choose_layers
from moe_lab.methods.ratios import budget
from moe_lab.methods.ratios.budget import Ratio
from moe_lab.models import activations, editing, merging, remapped, routers, stream
from moe_lab.models import layers as model_layers
from moe_lab.models.edits.base import Edit
from moe_lab.models.edits.keep import KeepLayer
from moe_lab.models.edits.merge import MergeExperts
from moe_lab.models.edits.plan import Plan
from moe_lab.models.layers import check_kept, check_own_rows
from moe_lab.models.merging import permutation_name
from moe_lab.profile import all_experts, collect, propagate
from moe_lab.profile.all_experts import AllExperts
from moe_lab.profile.layer import LayerStatistics
from moe_lab.profile.profile import Profile
from moe_lab.profile.propagate import propagated
from moe_lab.types import AlignName, LayerInfo, RouterName, UserError

ORDERS = ("all", "cosine", "first", "last", "random")
FROM_ACTIVATIONS = ("activations", "both")


@dataclass(frozen=True)
class Merge:
    """Merge the experts of some layers, each into as many as `ratio` or `num_experts` leave.

    grouping: which experts become one, and with which weights (files of grouping/: m_smoe, hc_smoe,
    ream). What follows is the paper's own where an option is null:

    align: how hidden units are matched before they are averaged. none; weights, by the largest sum
    of inner products of their weights (M-SMoE); activations, by the least sum of distances of what
    they compute on the sample; both, with the distances of their weights added (REAM).
    router: all rows stay and lead to the merged expert of their group (M-SMoE, HC-SMoE): merged
    identical experts change nothing, and the checkpoint is of our own form. Else each group keeps
    one row, and stock transformers load the result, but a token sends it less: dominant, that of
    the expert that gives its place (REAM); mean, the weighted mean of the group's; sum, their sum.
    propagate: each layer is measured behind the layers that are merged already (REAM); how many
    experts each keeps is still decided by the intact model.

    num_experts: so many experts stay in each layer; null: what `ratio` says by the grouping's own
    scores, as for pruning. layers: all (num_layers does not count), cosine (those whose MoE changes
    the hidden state least), first, last, random (by seed), or an explicit list of decoder layers.
    linkage: of hc_smoe; group_size: the most experts that ream makes one of. num_samples: how many
    documents of the calibration set all experts are computed on, where that is needed.
    """

    num_layers: int
    num_experts: int | None = None
    ratio: Ratio | None = None
    grouping: str = "m_smoe"
    layers: str | Sequence[int] = "all"
    align: str | None = None
    router: str | None = None
    propagate: bool | None = None
    linkage: str = "average"
    group_size: int = 16
    num_samples: int | None = 32
    seed: int = 0

    @property
    def _grouping(self) -> Grouping:
        return grouping_named(self.grouping)

    @property
    def _ratio(self) -> Ratio:
        """What says how many experts stay where `num_experts` does not."""
        return cast(Ratio, self.ratio)

    def _own(self, name: str) -> Any:
        """An option, or what the grouping's paper does where it is null."""
        value = getattr(self, name)
        return getattr(self._grouping, name) if value is None else value

    @property
    def _needs_experts(self) -> bool:
        """Whether every expert has to be computed on every token of the sample."""
        return self._grouping.outputs is not None or self._own("align") in FROM_ACTIVATIONS

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse layers and options that do not exist, and a router left with too few experts."""
        possible = {
            "grouping": grouping_names(),
            "align": (None, *get_args(AlignName)),
            "router": (None, *get_args(RouterName)),
        }
        for name, values in possible.items():
            if getattr(self, name) not in values:
                words = ", ".join("null" if value is None else value for value in values)
                raise UserError(
                    f"method.{name}={getattr(self, name)!r} does not exist; there are {words}"
                )
        check_layers("merge", self.layers, self.num_layers, ORDERS, layers)
        if self.num_samples is not None and self.num_samples < 1:
            raise UserError(
                f"method.num_samples={self.num_samples}: at least one document of the calibration "
                "set is needed; null takes all of them"
            )
        infos = self._known(layers)
        for info in infos:
            check_own_rows(info)
        if self.num_experts is None:
            self._ratio.check(infos)
        for info in infos:
            number = info.num_experts if self.num_experts is None else self.num_experts
            if self.num_experts is not None:
                self._check_number(info, number)
            self._grouping.check(info, number, vars(self))

    def _known(self, layers: Sequence[LayerInfo]) -> Sequence[LayerInfo]:
        """The layers that will be merged, as far as that is known before any work; else all."""
        if self.layers in ("first", "last"):
            return (
                layers[: self.num_layers] if self.layers == "first" else layers[-self.num_layers :]
            )
        return [
            info for info in layers if isinstance(self.layers, str) or info.index in self.layers
        ]

    def _check_number(self, info: LayerInfo, number: int) -> None:
        asked = f"method.num_experts={number}"
        if number >= info.num_experts:
            raise UserError(
                f"{asked}: layer {info.index} has {info.num_experts} experts, and fewer must stay "
                "for any to be merged"
            )
        try:
            check_kept(info, number, keeps_rows=self._own("router") == "all")
        except UserError as error:
            raise UserError(f"{asked} is too few: {error}") from error
        if number < 1 or number % info.groups:
            raise UserError(
                f"{asked}: the router of layer {info.index} works on {info.groups} groups of "
                "experts, and each must keep the same number, at least one"
            )

    def example(self, layers: Sequence[LayerInfo]) -> tuple[Edit, ...]:
        """Edits of the plan's kind; which experts become one is not known, so that none do."""
        return tuple(
            MergeExperts(info.index, info.name, kept=tuple(range(info.num_experts)),
                         groups=tuple((expert,) for expert in range(info.num_experts)),
                         router=self._own("router"))
            for info in self._known(layers)
        )  # fmt: skip

    def identity(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options that the plan depends on, those that the grouping's paper sets filled in."""
        own = {name: self._own(name) for name in ("align", "router", "propagate")}
        unused = {"linkage", "group_size"} - set(self._grouping.options)
        unused |= set() if self.layers == "random" else {"seed"}
        unused |= set() if self._needs_experts else {"num_samples"}
        unused |= {"num_experts"} if self.num_experts is None else {"ratio"}
        in_order = isinstance(self.layers, str) and self.layers != "all"
        unused |= set() if in_order else {"num_layers"}
        if "ratio" in options and hasattr(self._ratio, "identity"):
            options = options | {"ratio": self._ratio.identity(options["ratio"])}
        return {name: value for name, value in (options | own).items() if name not in unused}

    def code(self) -> list[object]:
        """What decides the plan beside this class."""
        modules: list[object] = [
            alignment, editing, base, merging, model_layers, propagate, all_experts, routers,
            remapped, collect, stream, activations, MergeExperts,
            inspect.getmodule(self._grouping.choose),
        ]  # fmt: skip
        if self.num_experts is None:
            ratio = self._ratio
            modules += [ratio, *(ratio.code() if hasattr(ratio, "code") else ())]
        return [*modules, budget, self._grouping.scores]

    def plan(self, profile: Profile) -> Plan:
        """One edit per MoE layer: merge, or keep where as many stay as there are."""
        order = choose_layers(self.layers, self.num_layers, profile.statistics, "layer", self.seed)
        scores = [
            (one.info, self._grouping.scores(one))
            for one in profile.statistics
            if one.info.index in order
        ]
        numbers = self._numbers(scores, profile)
        for info, _ in scores:
            self._grouping.check(info, numbers[info.index], vars(self))
        tensors: dict[str, Tensor] = {}
        if self._own("propagate"):
            edits = self._propagated(profile, numbers, tensors)
        else:
            edits = self._intact(profile, numbers, tensors)
        unseen = {str(one.info.index): int((one["count"] == 0).sum()) for one in profile.statistics}
        again = self._own("propagate")
        notes = {
            "statistics": propagate.MEASURED[again],
            "scores": self._grouping.scores.__name__,
            "grouping": self.grouping,
            "experts_without_tokens": unseen,
        }
        if self.num_experts is None and hasattr(self._ratio, "notes"):
            notes |= self._ratio.notes(scores, numbers)
        return Plan(tuple(edits), layer_order=order, notes=notes, tensors=tensors)

    def _numbers(self, scores: budget.Scores, profile: Profile) -> Mapping[int, int]:
        if self.num_experts is None:
            return self._ratio.numbers(scores, profile)
        return {info.index: self.num_experts for info, _ in scores}

    def _intact(
        self, profile: Profile, numbers: Mapping[int, int], tensors: dict[str, Tensor]
    ) -> list[Edit]:
        """All layers decided on the intact model; what all experts' outputs say is remembered."""
        merged = {
            one.info.index: one
            for one in profile.statistics
            if numbers.get(one.info.index, one.info.num_experts) < one.info.num_experts
        }
        outputs = self._grouping.outputs
        matrices: dict[int, Any] = dict.fromkeys(merged)
        if outputs is not None:
            matrices = self._ask(
                profile,
                {index: {"question": f"grouping/{self.grouping}"} for index in merged},
                lambda experts: outputs(experts).tolist(),
                [outputs],
            )
        groups = {
            index: self._choose(one, numbers[index], matrices[index])
            for index, one in merged.items()
        }
        if self._own("align") in FROM_ACTIVATIONS:
            questions = {
                index: {"question": "permutation", "align": self._own("align"), "of": one.groups}
                for index, one in groups.items()
            }
            answers = self._ask(
                profile,
                questions,
                lambda experts: self._permutation(experts, groups[experts.info.index]).tolist(),
                [alignment, merging],
            )
            for index, rows in answers.items():
                tensors[permutation_name(index)] = torch.tensor(rows)
        return [self._edit(one, groups.get(one.info.index)) for one in profile.statistics]

    def _ask(
        self,
        profile: Profile,
        questions: Mapping[int, Mapping[str, Any]],
        ask: Callable[[AllExperts], Any],
        code: Sequence[object],
    ) -> dict[int, Any]:
        return all_experts.answers(profile, self.num_samples, questions, ask, code)

    def _propagated(
        self, profile: Profile, numbers: Mapping[int, int], tensors: dict[str, Tensor]
    ) -> list[Edit]:
        """Each layer decided behind those that are merged already."""

        def edit_of(one: LayerStatistics, experts: AllExperts | None = None) -> Edit:
            index, num_experts = one.info.index, one.info.num_experts
            if numbers.get(index, num_experts) == num_experts:
                return self._edit(one, None)
            outputs = self._grouping.outputs
            matrix = outputs(experts) if outputs and experts else None
            groups = self._choose(one, numbers[index], matrix)
            if experts and self._own("align") in FROM_ACTIVATIONS:
                tensors[permutation_name(index)] = self._permutation(experts, groups)
            return self._edit(one, groups)

        if self._needs_experts:
            return propagated(profile, edit_of, tensors, experts_on=self.num_samples)
        return propagated(profile, edit_of, tensors)

    def _choose(
        self, one: LayerStatistics, number: int, outputs: Tensor | Sequence[float] | None
    ) -> Groups:
        if outputs is not None:
            outputs = torch.as_tensor(outputs, dtype=torch.float64)
        options = self.linkage, self.group_size
        return self._grouping.choose(MergeCandidates(one, number, outputs, *options))

    def _permutation(self, experts: AllExperts, groups: Groups) -> Tensor:
        return permutation(experts, groups.groups, with_weights=self._own("align") == "both")

    def _edit(self, one: LayerStatistics, groups: Groups | None) -> Edit:
        info = one.info
        if groups is None:
            return KeepLayer(info.index, info.name)
        return MergeExperts(
            info.index,
            info.name,
            scores=tuple(self._grouping.scores(one).tolist()),
            align=self._own("align"),
            router=self._own("router"),
            **vars(groups),
        )
