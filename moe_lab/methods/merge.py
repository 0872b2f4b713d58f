"""Merging: several experts of a layer become one."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, cast, get_args

import torch
from torch import Tensor

from moe_lab.finite import check_scores
from moe_lab.lookup import require_kind
from moe_lab.methods.base import LmHead, Mtp
from moe_lab.methods.grouping.alignment import permutation
from moe_lab.methods.grouping.base import (
    GROUPING_FILES,
    Grouping,
    Groups,
    MergeCandidates,
    as_grouping,
    described,
    grouping_options,
)
from moe_lab.methods.layer_choice import check_layers, choose_layers
from moe_lab.methods.ratios import budget
from moe_lab.methods.ratios.budget import Ratio
from moe_lab.methods.refit import Refitting
from moe_lab.models.edits.base import Edit
from moe_lab.models.edits.keep import KeepLayer
from moe_lab.models.edits.merge import MergeExperts
from moe_lab.models.edits.plan import Plan
from moe_lab.models.edits.refit import RefitExperts
from moe_lab.models.layers import check_kept, check_own_rows
from moe_lab.models.merging import permutation_name
from moe_lab.models.refitting import refit_name
from moe_lab.option import Option
from moe_lab.profile.all_experts import AllExperts, answers
from moe_lab.profile.layer import LayerStatistics
from moe_lab.profile.profile import Profile
from moe_lab.profile.propagate import MEASURED, propagated
from moe_lab.types import AlignName, LayerInfo, RouterName, UserError

ORDERS = ("all", "cosine", "first", "last", "random")
FROM_ACTIVATIONS = ("activations", "both")


@dataclass(frozen=True)
class Merge(Refitting):
    """Merge the experts of some layers, each into as many as `ratio` or `num_experts` leave.

    A ratio decides by the grouping's own scores, as for pruning by a metric's. What follows is the
    paper's own where an option is null:

    align: how hidden units are matched before they are averaged. none; weights, by the largest sum
    of inner products of their weights (M-SMoE); activations, by the least sum of distances of what
    they compute on the sample; both, with the distances of their weights added (REAM).
    router: all rows stay and lead to the merged expert of their group (M-SMoE, HC-SMoE): merged
    identical experts change nothing, and the checkpoint is of our own form. Else each group keeps
    one row, and stock transformers load the result, but a token sends it less: dominant, that of
    the expert that gives its place (REAM); mean, the weighted mean of the group's; sum, their sum.
    propagate: each layer is measured behind the layers that are merged already (REAM); how many
    experts each keeps is still decided by the intact model.
    """

    num_layers: Annotated[int, Option("how many layers, where layers is an order", least=1)]
    num_experts: Annotated[
        int | None, Option("experts that stay in each layer, in the place of ratio", least=1)
    ] = None
    ratio: Annotated[Ratio | None, Option("how many experts stay in each layer")] = None
    grouping: Annotated[
        Grouping | str,
        Option("which experts become one", files_of=GROUPING_FILES),
    ] = "m_smoe"
    layers: Annotated[
        str | Sequence[int],
        Option("all; cosine (that change the state least), first, last, random; or a list"),
    ] = "all"
    align: Annotated[
        str | None,
        Option("how hidden units are matched; null: as the paper", among=get_args(AlignName)),
    ] = None
    router: Annotated[
        str | None,
        Option("which router rows stay; null: as the paper", among=get_args(RouterName)),
    ] = None
    propagate: Annotated[
        bool | None, Option("measure behind layers that are merged already; null: as the paper")
    ] = None
    num_samples: Annotated[
        int | None,
        Option("documents on which all experts are computed, where needed; null: all", least=1),
    ] = 32
    seed: Annotated[int, Option("seed of layers=random")] = 0
    mtp: Mtp = "prune"
    lm_head: LmHead = "auto"

    of_condense = ("num_layers",)

    @functools.cached_property
    def _grouping(self) -> Grouping:
        return as_grouping(self.grouping)

    @property
    def _ratio(self) -> Ratio:
        """What says how many experts stay where `num_experts` does not."""
        return cast(Ratio, self.ratio)  # `check` has refused all others

    def _own(self, name: str) -> Any:
        """An option, or what the grouping's paper does where it is null."""
        value = getattr(self, name)
        return getattr(self._grouping, name) if value is None else value

    @property
    def _needs_experts(self) -> bool:
        """Whether every expert has to be computed on every token of the sample."""
        return self._grouping.needs_outputs or self._own("align") in FROM_ACTIVATIONS

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse layers and options that do not exist, and a router left with too few experts."""
        grouping = self._grouping
        super().check(layers)
        check_layers("merge", self.layers, self.num_layers, ORDERS, layers)
        infos = self._known(layers)
        for info in infos:
            check_own_rows(info)
        if self.num_experts is None:
            self._check_ratio(infos)
        for info in infos:
            number = info.num_experts if self.num_experts is None else self.num_experts
            if self.num_experts is not None:
                self._check_number(info, number)
            grouping.check(info, number)

    def _check_ratio(self, layers: Sequence[LayerInfo]) -> None:
        if self.ratio is None:
            raise UserError(
                "method.ratio=null and method.num_experts=null leave open how many experts stay: "
                "leave method.ratio out and choose ratio=uniform ratio.ratio=0.25, or ask for "
                "method.num_experts=4"
            )
        require_kind("ratio", self.ratio, Ratio).check(layers)

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
        edits = [
            MergeExperts(info.index, info.name, kept=tuple(range(info.num_experts)),
                         groups=tuple((expert,) for expert in range(info.num_experts)),
                         router=self._own("router"))
            for info in self._known(layers)
        ]  # fmt: skip
        return self.followed(edits, self._known(layers))

    def foreseen(self, layers: Sequence[LayerInfo]) -> Mapping[int, int] | None:
        """What num_experts says, or the ratio where no score enters it."""
        if self.num_experts is None:
            return self._ratio.foreseen(layers)
        return {info.index: self.num_experts for info in self._known(layers)}

    @classmethod
    def settings(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options, with the grouping's name and its own options among them."""
        return super().settings(options) | described(options["grouping"])

    @classmethod
    def groups(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        """Which other config groups decide its result."""
        return ("ratio",) if options.get("num_experts") is None else ()

    def identity(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options that the plan depends on, those that the grouping's paper sets filled in."""
        own: dict[str, Any] = {name: self._own(name) for name in ("align", "router", "propagate")}
        grouping = grouping_options(self._grouping, options.get("grouping"))
        own["grouping"] = {"name": self._grouping.name} | self._grouping.identity(grouping)
        if self.num_experts is None and self.ratio is not None:
            own["ratio"] = self.ratio.identity(options["ratio"])
        unused = set() if self.layers == "random" else {"seed"}
        unused |= set() if self._needs_experts else {"num_samples"}
        unused |= {"num_experts"} if self.num_experts is None else {"ratio"}
        in_order = isinstance(self.layers, str) and self.layers != "all"
        unused |= set() if in_order else {"num_layers"}
        asked = super().identity(options) | own
        return {name: value for name, value in asked.items() if name not in unused}

    def parts(self) -> Sequence[object]:
        """The grouping, which may be given by its name."""
        return [self._grouping]

    def decide(self, profile: Profile) -> Plan:
        """One edit per MoE layer: merge, or keep where as many stay as there are."""
        order = choose_layers(self.layers, self.num_layers, profile.statistics, "layer", self.seed)
        scores = [
            (one.info, self._grouping.scores(one))
            for one in profile.statistics
            if one.info.index in order
        ]
        for info, score_E in scores:
            check_scores(
                info.index, info.num_experts, score_E, f"the grouping {self._grouping.name}"
            )
        numbers = self._numbers(scores, profile)
        for info, _ in scores:
            self._grouping.check(info, numbers[info.index])
        tensors: dict[str, Tensor] = {}
        if self._own("propagate"):
            edits = self._propagated(profile, numbers, tensors)
        else:
            edits = self._intact(profile, numbers, tensors)
        unseen = {str(one.info.index): int((one["count"] == 0).sum()) for one in profile.statistics}
        notes = {
            "statistics": MEASURED[self._own("propagate")],
            "scores": self._grouping.scored_by,
            "grouping": self._grouping.name,
            "experts_without_tokens": unseen,
        }
        if self.num_experts is None:
            layers = [info for info, _ in scores]
            notes |= self._ratio.told(layers, numbers) | self._ratio.notes(scores, numbers)
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
        matrices = self._all_outputs(profile, list(merged))
        groups = {
            index: self._choose(one, numbers[index], matrices.get(index))
            for index, one in merged.items()
        }
        if self._own("align") in FROM_ACTIVATIONS:
            tensors.update(self._permutations(profile, groups))
        if self._grouping.refits:
            tensors.update(self._down_projections(profile, groups))
        each = (self._edits(one, groups.get(one.info.index)) for one in profile.statistics)
        return [edit for edits in each for edit in edits]

    def _all_outputs(self, profile: Profile, indices: Sequence[int]) -> dict[int, Any]:
        """What the grouping needs to know of all experts' outputs, by layer index."""
        grouping = self._grouping
        if not grouping.needs_outputs:
            return {}
        names = grouping.outputs_options
        options = grouping_options(grouping, vars(grouping)).items()
        question = {"question": f"grouping/{grouping.name}"}
        question |= {name: value for name, value in options if names is None or name in names}
        return answers(
            profile,
            self.num_samples,
            dict.fromkeys(indices, question),
            lambda experts: grouping.outputs(experts).tolist(),
            [grouping],
        )

    def _permutations(self, profile: Profile, groups: Mapping[int, Groups]) -> dict[str, Tensor]:
        """How the hidden units of each layer's experts are matched, as the plan's tensors."""
        questions = {
            index: {"question": "permutation", "align": self._own("align"), "of": one.groups}
            for index, one in groups.items()
        }
        found = answers(
            profile,
            self.num_samples,
            questions,
            lambda experts: self._permutation(experts, groups[experts.info.index]).tolist(),
            [permutation],
        )
        return {permutation_name(index): torch.tensor(rows) for index, rows in found.items()}

    def _down_projections(
        self, profile: Profile, groups: Mapping[int, Groups]
    ) -> dict[str, Tensor]:
        """Those that the grouping finds for the merged experts, as the plan's tensors."""
        grouping = self._grouping
        questions = {
            index: {
                "question": f"down projections/{grouping.name}",
                "of": one.groups,
                "shares": one.weights,
            }
            for index, one in groups.items()
        }

        def ask(experts: AllExperts) -> dict[str, Tensor]:
            index = experts.info.index
            return {refit_name(index): grouping.down_projections(experts, groups[index]).cpu()}

        found = answers(
            profile, self.num_samples, questions, ask, [grouping], profile.remember_tensors
        )
        return {name: made for layer in found.values() for name, made in layer.items()}

    def _propagated(
        self, profile: Profile, numbers: Mapping[int, int], tensors: dict[str, Tensor]
    ) -> list[Edit]:
        """Each layer decided behind those that are merged already."""
        grouping = self._grouping

        def edits_of(one: LayerStatistics, experts: AllExperts | None = None) -> list[Edit]:
            index, num_experts = one.info.index, one.info.num_experts
            if numbers.get(index, num_experts) == num_experts:
                return self._edits(one, None)
            matrix = grouping.outputs(experts) if experts and grouping.needs_outputs else None
            groups = self._choose(one, numbers[index], matrix)
            if experts and self._own("align") in FROM_ACTIVATIONS:
                tensors[permutation_name(index)] = self._permutation(experts, groups)
            if experts and grouping.refits:
                tensors[refit_name(index)] = grouping.down_projections(experts, groups).cpu()
            return self._edits(one, groups)

        if self._needs_experts:
            return propagated(profile, edits_of, tensors, experts_on=self.num_samples)
        return propagated(profile, edits_of, tensors)

    def _choose(
        self, one: LayerStatistics, number: int, outputs: Tensor | Sequence[float] | None
    ) -> Groups:
        if outputs is not None:
            outputs = torch.as_tensor(outputs, dtype=torch.float64)
            if not bool(outputs.isfinite().all()):
                raise UserError(
                    f"layer {one.info.index}: what the grouping {self._grouping.name} makes of its "
                    "experts' outputs is not finite, and the outputs are: its formula has no value "
                    "here"
                )
        return self._grouping.choose(MergeCandidates(one, number, outputs))

    def _permutation(self, experts: AllExperts, groups: Groups) -> Tensor:
        return permutation(experts, groups.groups, with_weights=self._own("align") == "both")

    def _edits(self, one: LayerStatistics, groups: Groups | None) -> list[Edit]:
        info = one.info
        if groups is None:
            return [KeepLayer(info.index, info.name)]
        merge = MergeExperts(
            info.index,
            info.name,
            scores=tuple(self._grouping.scores(one).tolist()),
            align=self._own("align"),
            router=self._own("router"),
            **vars(groups),
        )
        return [merge, *(RefitExperts(info.index, info.name) for _ in range(self._grouping.refits))]

    @property
    def refits(self) -> bool:
        """Also where the grouping finds down projections itself."""
        return self.refit or self._grouping.refits
