"""The experts of each condensed layer, chosen when they are first asked for and remembered."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from moe_lab.finite import check_scores
from moe_lab.methods.condense.base import ExpertCandidates, choice_named, draws, shared_gate
from moe_lab.methods.condense.expert_search import IntactStates, OpenLayer, search_terms
from moe_lab.methods.condense.layer_search import CondensedSets
from moe_lab.models.condensing import part_widths
from moe_lab.models.edits.condense import CondenseLayer
from moe_lab.models.experts import Experts
from moe_lab.models.stream import LayerStream
from moe_lab.profile.documents import to_fit_and_choose
from moe_lab.profile.layer import LayerStatistics
from moe_lab.profile.profile import Answer, Profile
from moe_lab.progress import progress
from moe_lab.types import Choice


class Asked(Protocol):
    """What the choice of experts needs to know of the method's options (`method.Condense`)."""

    experts: str | Sequence[int]
    layers: str | Sequence[int]
    num_routed: int
    gates: str
    beam: int
    seed: int

    def searches(self) -> list[object]:
        """What decides what a search finds."""
        ...


class ExpertChoices:
    """The experts of each layer, chosen when they are first asked for and remembered."""

    def __init__(self, method: Asked, profile: Profile):
        self.method, self.profile = method, profile
        self.statistics = {one.info.index: one for one in profile.statistics}
        self.chosen: dict[int, CondenseLayer] = {}
        self._states: IntactStates | None = None
        by_name = isinstance(method.experts, str)
        self._identity = {
            "experts": method.experts if by_name else list(method.experts),
            "num_routed": method.num_routed if by_name else None,
            "gates": method.gates,
            "seed": method.seed if draws(method.experts) else None,
        }

    @functools.cached_property
    def stream(self) -> LayerStream:
        """The model's decoder layers on the calibration set, opened when first needed."""
        stream = self.profile.open_stream()
        stream.cache.announce(
            {
                "every expert's output at one layer": self._expert_bytes(stream),
                "states of the search over layers": self._layer_bytes(stream),
            }
        )
        if str(self.method.layers).startswith(("greedy_", "one_shot_global")):
            stream.check_hidden_alone()
        search_terms(next(iter(stream.moe.values())))
        return stream

    def _expert_bytes(self, stream: LayerStream) -> int:
        most = max(one.info.num_experts for one in self.statistics.values())
        return (most + 4) * stream.state_bytes()

    def _layer_bytes(self, stream: LayerStream) -> int:
        levels, sets = len(stream.layers) + 1, self.method.beam * len(self.statistics)
        return (levels + 2 * sets) * stream.state_bytes()

    def remember(self, identity: dict[str, Any], work: Callable[[], Answer]) -> Answer:
        """What was found before for the same question, options and data."""
        return self.profile.remember(self._identity | identity, work, self.method.searches())

    def refitted(self) -> CondensedSets:
        """The model with any set of its layers condensed, on documents that choose alone."""
        _, documents = to_fit_and_choose(self.profile.num_documents)
        opened = functools.cache(lambda: self.opened(documents))

        def remember(identity: dict[str, Any], work: Callable[[], Answer]) -> Answer:
            return self.remember(identity | {"documents": documents}, work)

        return CondensedSets(opened, self.edits(self.statistics), remember)

    def opened(self, documents: Sequence[int], profile: Profile | None = None) -> LayerStream:
        """The model's decoder layers on some documents, for a search over layers.

        profile: of whose calibration set they are; None: of that in which experts are chosen.
        """
        stream = (profile or self.profile).open_stream(documents=documents)
        size = self._layer_bytes(stream) + stream.state_bytes()  # and the intact model's last ones
        stream.cache.announce({"states of the search over layers": size})
        return stream

    def edits(self, indices: Iterable[int]) -> dict[int, CondenseLayer]:
        """Condensing edits of these layers, in order of the layers."""
        indices = sorted(indices)
        missing = [index for index in indices if index not in self.chosen]
        if missing and min(missing) < max(self.chosen, default=-1):
            self._states = None  # the pass over the layers begins again
        for index in progress(missing, "condense: choosing experts") if missing else ():
            self.chosen[index] = self._edit(self.statistics[index])
        self.chosen = dict(sorted(self.chosen.items()))
        return {index: self.chosen[index] for index in indices}

    def _edit(self, statistics: LayerStatistics) -> CondenseLayer:
        gates = choice_named("gates", self.method.gates)(statistics)
        info, source = statistics.info, f"condense.gates={self.method.gates}"
        check_scores(info.index, info.num_experts, gates, source)
        choice = self._choice(statistics, gates)
        return CondenseLayer(
            statistics.info.index,
            statistics.info.name,
            experts=choice.chosen,
            gates=tuple(float(gates[expert]) for expert in choice.chosen),
            shared_gate=shared_gate(statistics),
            divergence=choice.divergence,
            widths=part_widths(statistics.info, choice.chosen),
        )

    def _choice(self, statistics: LayerStatistics, gates: torch.Tensor) -> Choice:
        name = self.method.experts
        if not isinstance(name, str):
            return Choice(tuple(name))
        if self.method.num_routed == 0:
            return Choice(())

        def work() -> dict[str, Any]:
            candidates = self._candidates(statistics, gates)
            made = choice_named("experts", name)(candidates, self.method.num_routed)
            return {"chosen": made.chosen, "divergence": made.divergence}

        answer = self.remember({"question": "experts", "layer": statistics.info.index}, work)
        return Choice(tuple(answer["chosen"]), tuple(answer["divergence"]))

    def _candidates(self, statistics: LayerStatistics, gates: torch.Tensor) -> ExpertCandidates:
        index = statistics.info.index

        def open_layer() -> OpenLayer:
            self._states = self._states or IntactStates(self.stream)
            return self._states.open(index, gates, shared_gate(statistics))

        @contextmanager
        def weights() -> Iterator[Experts]:
            with self.stream.layer(index):
                yield self.stream.moe[index].experts

        return ExpertCandidates(statistics, gates, self.method.seed, open_layer, weights)
