"""CD-MoE: whole MoE layers become small dense ones."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe_lab import (
    condense,
    divergence,
    editing,
    expert_search,
    layer_search,
    layerwise,
    moe,
    stream,
)
from moe_lab.condense import Candidates, Layers, option, shared_gate
from moe_lab.editing import check_is_sum, part_widths
from moe_lab.evidence import Evidence
from moe_lab.expert_search import IntactStates
from moe_lab.layer_choice import example_layers
from moe_lab.layer_search import CondensedSets
from moe_lab.progress import progress
from moe_lab.statistics import LayerStatistics
from moe_lab.stream import LayerStream
from moe_lab.types import Choice, Edit, LayerInfo, Plan, UserError


@dataclass
class Condense:
    """Condense `num_layers` layers to their shared experts and `num_routed` routed ones.

    CD-MoE (2412.00069): num_routed=0 is CD-MoE-S, more is CD-MoE-SR. experts, layers: the name of a
    search in moe_lab/condense/, or an explicit list (experts for every layer alike; true indices
    of decoder layers). gates: the constants in the router's place. beam: of a greedy search over
    layers. seed: of random choices. padding: the largest share of the compressed model's
    parameters that zeros may take so that stock transformers can hold it.
    """

    num_layers: int
    num_routed: int
    experts: str | Sequence[int] = "greedy_js"
    layers: str | Sequence[int] = "greedy_js"
    gates: str = "mean_selected"
    beam: int = 1
    seed: int = 0
    padding: float = 0.01

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse layers, experts, searches or numbers that do not exist."""
        self._check_numbers()
        option("gates", self.gates)
        indices = [info.index for info in layers]
        if isinstance(self.layers, str):
            option("layers", self.layers)
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

    def _check_numbers(self) -> None:
        if self.beam < 1:
            raise UserError(f"condense.beam={self.beam}: it must be at least 1")
        if self.beam > 1 and not str(self.layers).startswith("greedy_"):
            raise UserError(
                f"condense.beam={self.beam} is for greedy searches over layers, and "
                f"condense.layers={self.layers} is none: leave condense.beam at 1"
            )
        if not 0 <= self.padding <= 1:
            raise UserError(f"condense.padding={self.padding}: it must be from 0 to 1")

    def _check_layer(self, info: LayerInfo) -> None:
        if info.obstacle:
            way = "compress the model that it comes from"
            if not info.real_experts:
                way = "method=prune works with this family"
            raise UserError(
                f"layer {info.index} cannot become one dense gated MLP: {info.obstacle}; {way}"
            )
        if isinstance(self.experts, str):
            option("experts", self.experts)
            num_routed = self.num_routed
        else:
            num_routed = len(self.experts)
            if len(set(self.experts)) < num_routed:
                raise UserError(f"condense.experts={list(self.experts)}: name each only once")
            if unknown := [e for e in self.experts if not 0 <= e < info.num_experts]:
                raise UserError(
                    f"condense.experts names {unknown}, but layer {info.index} has experts "
                    f"0 to {info.num_experts - 1}"
                )
        if not 0 <= num_routed <= info.num_experts:
            raise UserError(
                f"condense.num_routed={num_routed}: layer {info.index} has {info.num_experts} "
                "routed experts"
            )
        if num_routed == 0 and not info.shared:
            raise UserError(
                f"condense.num_routed=0 (CD-MoE-S) needs shared experts, and layer {info.index} "
                "has none: ask for condense.num_routed of at least 1"
            )

    def example(self, layers: Sequence[LayerInfo]) -> tuple[Edit, ...]:
        """Edits of the shape that the plan will have; of its layers only the number is known."""
        number = self.num_routed if isinstance(self.experts, str) else len(self.experts)
        parts = {"experts": tuple(range(number)), "gates": (1.0,) * number}
        return tuple(
            Edit(
                info.index, info.name, "condense", widths=part_widths(info, range(number)), **parts
            )
            for info in example_layers(self.layers, self.num_layers, layers)
        )

    def identity(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options that the plan depends on: the seed only where something is random."""
        seeded = "random" in (self.experts, self.layers)
        return {name: value for name, value in options.items() if seeded or name != "seed"}

    def code(self) -> list[Any]:
        """What decides the plan beside this class."""
        return [*self.searches(), *self._plug_ins("layers")]

    def searches(self) -> list[Any]:
        """The modules that decide what a search finds.

        Not the way in which layers are chosen by it: different ways share their answers.
        """
        modules = [
            condense,
            divergence,
            editing,
            expert_search,
            layer_search,
            layerwise,
            moe,
            stream,
        ]
        return [self, *modules, *self._plug_ins("experts", "gates")]

    def _plug_ins(self, *kinds: str) -> list[Any]:
        """What condense.<kind> names, where it is no explicit list."""
        names = {kind: getattr(self, kind) for kind in kinds}
        return [option(kind, name) for kind, name in names.items() if isinstance(name, str)]

    @torch.no_grad()
    def plan(self, evidence: Evidence) -> Plan:
        """Choose the layers, and experts for all that come into question; one edit per MoE layer.

        A search over layers needs the experts of every layer; else only the chosen ones get some.
        """
        experts = Experts(self, evidence)
        order = self._choose_layers(experts)
        edits = experts.edits(order.chosen)
        kept = {i: Edit(i, s.info.name, "keep") for i, s in experts.statistics.items()}
        return Plan(
            tuple((kept | edits).values()),
            layer_order=order.chosen,
            layer_divergence=order.divergence,
            searched=tuple(e for i, e in experts.chosen.items() if i not in order.chosen),
            notes={"statistics": "intact model", "padding": self.padding},
        )

    def _choose_layers(self, experts: Experts) -> Choice:
        if not isinstance(self.layers, str):
            return Choice(tuple(self.layers))

        def condensed() -> CondensedSets:
            edits = experts.edits(experts.statistics)
            return CondensedSets(lambda: experts.stream, edits, experts.remember)

        layers = Layers(experts.statistics, condensed, self.beam, self.seed)
        return option("layers", self.layers)(layers, self.num_layers)


class Experts:
    """The experts of each layer, chosen when they are first asked for and remembered."""

    def __init__(self, method: Condense, evidence: Evidence):
        self.method, self.evidence = method, evidence
        self.statistics = {one.info.index: one for one in evidence.statistics}
        self.chosen: dict[int, Edit] = {}
        self._states: IntactStates | None = None
        by_name = isinstance(method.experts, str)
        self._identity = {
            "experts": method.experts if by_name else list(method.experts),
            "num_routed": method.num_routed if by_name else None,
            "gates": method.gates,
            "seed": method.seed if method.experts == "random" else None,
        }

    @functools.cached_property
    def stream(self) -> LayerStream:
        """The model's decoder layers on the calibration set, opened when first needed."""
        stream = self.evidence.open_stream()
        stream.cache.announce(
            {
                "every expert's output at one layer": self._expert_bytes(stream),
                "states of the search over layers": self._layer_bytes(stream),
            }
        )
        first = next(iter(stream.moe))
        with stream.layer(first):
            check_is_sum(stream.moe[first])
        return stream

    def _expert_bytes(self, stream: LayerStream) -> int:
        most = max(one.info.num_experts for one in self.statistics.values())
        return (most + 4) * stream.state_bytes()

    def _layer_bytes(self, stream: LayerStream) -> int:
        levels, sets = len(stream.layers) + 1, self.method.beam * len(self.statistics)
        return (levels + 2 * sets) * stream.state_bytes()

    def remember(self, identity: dict[str, Any], work: Any) -> Any:
        """What was found before for the same question, options and data."""
        return self.evidence.remember(self._identity | identity, work, self.method.searches())

    def edits(self, indices: Iterable[int]) -> dict[int, Edit]:
        """Condensing edits of these layers, in order of the layers."""
        indices = sorted(indices)
        missing = [index for index in indices if index not in self.chosen]
        if missing and min(missing) < max(self.chosen, default=-1):
            self._states = None  # the pass over the layers begins again
        for index in progress(missing, "condense: choosing experts") if missing else ():
            self.chosen[index] = self._edit(self.statistics[index])
        self.chosen = dict(sorted(self.chosen.items()))
        return {index: self.chosen[index] for index in indices}

    def _edit(self, statistics: LayerStatistics) -> Edit:
        gates = option("gates", self.method.gates)(statistics)
        choice = self._choice(statistics, gates)
        return Edit(
            statistics.info.index,
            statistics.info.name,
            "condense",
            experts=choice.chosen,
            gates=tuple(float(gates[expert]) for expert in choice.chosen),
            shared_gate=shared_gate(statistics),
            divergence=choice.divergence,
            widths=part_widths(statistics.info, choice.chosen),
        )

    def _choice(self, statistics: LayerStatistics, gates: torch.Tensor) -> Choice:
        if not isinstance(self.method.experts, str):
            return Choice(tuple(self.method.experts))
        if self.method.num_routed == 0:
            return Choice(())

        def work() -> dict[str, Any]:
            candidates = self._candidates(statistics, gates)
            made = option("experts", self.method.experts)(candidates, self.method.num_routed)
            return {"chosen": made.chosen, "divergence": made.divergence}

        found = self.remember({"question": "experts", "layer": statistics.info.index}, work)
        return Choice(tuple(found["chosen"]), tuple(found["divergence"]))

    def _candidates(self, statistics: LayerStatistics, gates: torch.Tensor) -> Candidates:
        index = statistics.info.index

        def open_layer() -> Any:
            self._states = self._states or IntactStates(self.stream)
            return self._states.open(index, gates, shared_gate(statistics))

        @contextmanager
        def weights() -> Iterator[nn.Module]:
            with self.stream.layer(index):
                yield self.stream.moe[index].experts

        return Candidates(statistics, gates, self.method.seed, open_layer, weights)
