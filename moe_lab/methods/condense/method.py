"""CD-MoE: whole MoE layers become small dense ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch

from moe_lab.methods.base import LmHead, Method, Mtp, form_notes
from moe_lab.methods.condense.base import (
    LayerCandidates,
    choice_named,
    chooses_units,
    draws,
    is_own,
)
from moe_lab.methods.condense.expert_choice import ExpertChoices
from moe_lab.methods.condense.layer_data import PROPAGATIONS
from moe_lab.methods.condense.layer_search import CondensedSets
from moe_lab.methods.condense.refits import REFITS, Refits
from moe_lab.methods.condense.solving import condensed_width
from moe_lab.methods.layer_choice import example_layers
from moe_lab.models.condensing import part_widths
from moe_lab.models.edits.base import Edit
from moe_lab.models.edits.condense import CondenseLayer
from moe_lab.models.edits.condense_units import CondenseUnits
from moe_lab.models.edits.keep import KeepLayer
from moe_lab.models.edits.plan import Plan
from moe_lab.models.superset import Convert
from moe_lab.option import Option
from moe_lab.profile.grams import TOKEN_WEIGHTS
from moe_lab.profile.profile import Profile, Tensors
from moe_lab.types import Choice, LayerInfo, UserError

EXPERTS, LAYERS, GATES = (f"{__package__}.{kind}" for kind in ("experts", "layers", "gates"))


@dataclass
class Condense(Method):
    """Condense `num_layers` layers to their shared experts and `num_routed` routed ones.

    CD-MoE (2412.00069): num_routed=0 is CD-MoE-S, more is CD-MoE-SR. Searches, and gates, are files
    in folders here, or the dotted path of a function of one's own.
    """

    num_layers: Annotated[
        int, Option("layers that are condensed, where layers is no list", least=1)
    ]
    num_routed: Annotated[int, Option("routed experts kept in each", least=0)]
    experts: Annotated[
        str | Sequence[int],
        Option("a search for them, or a list for every layer alike", files_of=(EXPERTS,)),
    ] = "greedy_js"
    layers: Annotated[
        str | Sequence[int],
        Option("a search for them, or a list of decoder layers", files_of=(LAYERS,)),
    ] = "greedy_js"
    gates: Annotated[str, Option("constants in the router's place", files_of=(GATES,))] = (
        "mean_selected"
    )
    refit: Annotated[
        str,
        Option("what the calibration set fits anew by least squares, in closed form", among=REFITS),
    ] = "none"
    width: Annotated[
        int | None,
        Option(
            "of experts=neurons: hidden units of a condensed layer; null: as num_routed experts "
            "beside the shared ones have",
            least=1,
        ),
    ] = None
    propagate: Annotated[
        str | None,
        Option(
            "of a refit: to the intact layer's output alone (none), to what it makes of the states "
            "behind layers condensed before (block), or to what is missing there to the intact "
            "state (residual); null: residual",
            among=PROPAGATIONS,
        ),
    ] = None
    token_weight: Annotated[
        str,
        Option(
            "of a refit: each token weighs 1 / mean square of the state behind the layer, or 1",
            among=TOKEN_WEIGHTS,
        ),
    ] = "output"
    ridge: Annotated[
        float | None,
        Option(
            "of a refit: how strongly it holds to the constant gates, in shares of the mean square "
            "of a hidden unit; null: as held-out documents say",
            least=0,
        ),
    ] = None
    own_documents: Annotated[
        int,
        Option(
            "of a refit, against forgetting what the calibration set does not show: so many "
            "documents that the model writes itself are fitted along",
            least=0,
        ),
    ] = 0
    own_weight: Annotated[
        float,
        Option("what these weigh together, in shares of the calibration set", least=0),
    ] = 0.3
    fit_steps: Annotated[
        int,
        Option(
            "of refit=down_proj: gradient steps that then fit all three projections of each layer "
            "to what it should add",
            least=0,
        ),
    ] = 0
    beam: Annotated[int, Option("sets of layers that a greedy search carries on", least=1)] = 1
    seed: Annotated[int, Option("seed of random experts and layers")] = 0
    padding: Annotated[
        float,
        Option("largest share of zeros so that stock transformers can hold it", least=0, most=1),
    ] = 0.01
    convert: Convert = None
    mtp: Mtp = "prune"
    lm_head: LmHead = "auto"

    of_condense = (
        "num_layers", "num_routed", "experts", "layers", "gates", "refit", "width", "propagate",
        "token_weight", "ridge", "own_documents", "own_weight", "fit_steps", "beam", "seed",
        "padding", "convert",
    )  # fmt: skip

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse layers, experts, searches or numbers that do not exist."""
        super().check(layers)
        self._check_beam()
        self._check_refit()
        choice_named("gates", self.gates)
        if not self.experts:
            raise UserError("condense.experts=[]: name one or more; none are condense.num_routed=0")
        indices = [info.index for info in layers]
        if isinstance(self.layers, str):
            choice_named("layers", self.layers)
            if not 1 <= self.num_layers <= len(layers):
                raise UserError(
                    f"condense.num_layers={self.num_layers}: the model has {len(layers)} MoE layers"
                )
        elif not self.layers or len(set(self.layers)) < len(self.layers):
            raise UserError(f"condense.layers={list(self.layers)}: name one or more, each once")
        elif unknown := [index for index in self.layers if index not in indices]:
            raise UserError(
                f"condense.layers names {unknown}, but the model's MoE layers are {indices} "
                "(true indices; dense layers count)"
            )
        for info in layers:
            self._check_layer(info)

    def _check_beam(self) -> None:
        greedy = str(self.layers).startswith("greedy_")
        if self.beam > 1 and not greedy and not is_own(self.layers):
            raise UserError(
                f"condense.beam={self.beam} is for greedy searches over layers, and "
                f"condense.layers={self.layers} is none: leave condense.beam at 1"
            )

    def _check_refit(self) -> None:
        """Refuse options of a refit without one, and a choice of units that is not refitted."""
        if chooses_units(self.experts) and self.refit != "down_proj":
            raise UserError(
                f"condense.experts={self.experts} chooses hidden units by what a refit makes of "
                f"them, and condense.refit={self.refit}: condense.refit=down_proj, or "
                "condense=closed_form, which sets all that goes with it"
            )
        if self.width is not None and not chooses_units(self.experts):
            raise UserError(
                f"condense.width={self.width} is for a choice of hidden units, and "
                f"condense.experts={self.experts} chooses whole experts: condense.experts=neurons, "
                "or condense.num_routed"
            )
        if self.refit == "none" and self.own_documents:
            raise UserError(
                f"condense.own_documents={self.own_documents} are for a refit, and "
                "condense.refit=none fits nothing: condense.refit=down_proj"
            )
        if self.refit == "none" and (self.propagate or "none") != "none":
            raise UserError(
                f"condense.propagate={self.propagate} says what a refit is fitted to, and "
                "condense.refit=none: condense.refit=down_proj"
            )
        if self.fit_steps and self.refit != "down_proj":
            raise UserError(
                f"condense.fit_steps={self.fit_steps} go on from a closed form, and "
                f"condense.refit={self.refit}: condense.refit=down_proj, or condense=closed_form"
            )

    @property
    def propagated(self) -> str:
        """What a refit is fitted to."""
        return self.propagate or "residual"

    def _check_layer(self, info: LayerInfo) -> None:
        if info.obstacle:
            way = "compress the model that it comes from"
            if not info.real_experts:
                way = "method=prune works with this family"
            raise UserError(f"layer {info.index} cannot be condensed: {info.obstacle}; {way}")
        if isinstance(self.experts, str):
            choice_named("experts", self.experts)
            num_routed = self.num_routed
        else:
            num_routed = len(self.experts)
            if not num_routed:
                raise UserError(
                    "condense.experts=[] names none: name one or more, or keep the shared experts "
                    "alone with condense.experts=greedy_js condense.num_routed=0"
                )
            if len(set(self.experts)) < num_routed:
                raise UserError(f"condense.experts={list(self.experts)}: name each only once")
            if unknown := [e for e in self.experts if not 0 <= e < info.num_experts]:
                raise UserError(
                    f"condense.experts names {unknown}, but layer {info.index} has experts "
                    f"0 to {info.num_experts - 1}"
                )
        if num_routed > info.num_experts:
            raise UserError(
                f"condense.num_routed={num_routed}: layer {info.index} has {info.num_experts} "
                "routed experts"
            )
        most = condensed_width(info, info.num_experts)
        if self.width is not None and self.width > most:
            raise UserError(
                f"condense.width={self.width}: layer {info.index} has {most} hidden units, the "
                "shared experts' among them"
            )
        if num_routed == 0 and not info.shared:
            raise UserError(
                f"condense.num_routed=0 (CD-MoE-S) needs shared experts, and layer {info.index} "
                "has none: ask for condense.num_routed of at least 1"
            )

    def example(self, layers: Sequence[LayerInfo]) -> tuple[Edit, ...]:
        """Edits of the shape that the plan will have; of its layers only the number is known."""
        number = self.num_routed if isinstance(self.experts, str) else len(self.experts)
        if self.refit == "down_proj":
            return tuple(
                CondenseUnits(info.index, info.name, self.width or condensed_width(info, number))
                for info in example_layers(self.layers, self.num_layers, layers)
            )
        return tuple(
            CondenseLayer(
                info.index,
                info.name,
                experts=tuple(range(number)),
                gates=(1.0,) * number,
                widths=part_widths(info, range(number)),
            )
            for info in example_layers(self.layers, self.num_layers, layers)
        )

    def identity(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options that the plan depends on: the seed only where something is random."""
        seeded = self.fit_steps > 0 or any(map(draws, (self.experts, self.layers)))
        return {name: value for name, value in options.items() if seeded or name != "seed"}

    def parts(self) -> Sequence[object]:
        """The choices, which are given by name."""
        return self._choices(experts=self.experts, gates=self.gates, layers=self.layers)

    def searches(self) -> list[object]:
        """What decides what a search finds.

        Not the way in which layers are chosen by it: different ways share their answers.
        """
        return [self, *self._choices(experts=self.experts, gates=self.gates)]

    def _choices(self, **names: str | Sequence[int]) -> list[object]:
        """What condense.<kind> names, where it is no explicit list."""
        return [choice_named(kind, name) for kind, name in names.items() if isinstance(name, str)]

    @torch.no_grad()
    def plan(self, profile: Profile) -> Plan:
        """Choose the layers, and experts for all that come into question; one edit per MoE layer.

        A search over layers needs the experts of every layer; else only the chosen ones get some.
        """
        experts = ExpertChoices(self, profile)
        refits = Refits(self, profile, experts) if self.refit != "none" else None
        order = self._choose_layers(experts, refits)
        if refits is None:
            edits: Mapping[int, Edit] = experts.edits(order.chosen)
            tensors: Tensors = {}
        else:
            edits, tensors = refits.fitted(order.chosen, self.propagated, steps=self.fit_steps)
        kept = {i: KeepLayer(i, s.info.name) for i, s in experts.statistics.items()}
        notes = {"statistics": "intact model"} | form_notes(self.padding, self.convert)
        notes |= {} if refits is None else {"refit": self.refit, "propagate": self.propagated}
        notes |= {"fit_steps": self.fit_steps} if self.fit_steps else {}
        return Plan(
            tuple(edits.get(i, keep) for i, keep in kept.items()),
            layer_order=order.chosen,
            layer_divergence=order.divergence,
            searched=tuple(e for i, e in experts.chosen.items() if i not in order.chosen),
            notes=notes,
            tensors=tensors,
        )

    def _choose_layers(self, experts: ExpertChoices, refits: Refits | None) -> Choice:
        if not isinstance(self.layers, str):
            return Choice(tuple(self.layers))
        every = experts.statistics

        def condensed() -> CondensedSets:
            if refits and chooses_units(self.experts):
                edits, tensors = refits.fitted(every, "none")
                remember = refits.remember(None)
                return CondensedSets(lambda: experts.stream, edits, remember, tensors)
            return CondensedSets(lambda: experts.stream, experts.edits(every), experts.remember)

        def refitted() -> CondensedSets:
            return refits.candidates() if refits else experts.refitted()

        layers = LayerCandidates(every, condensed, refitted, self.beam, self.seed)
        chosen: Choice = choice_named("layers", self.layers)(layers, self.num_layers)
        return chosen
