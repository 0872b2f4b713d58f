"""CD-MoE (2412.00069): which layers become dense, with which experts and which gates.

A condensed layer computes, for every token, w_s * shared(x) + sum_{i in S} w_i * E_i(x): no
router. `gates/` holds the ways to set the constants w_i, `experts/` the ways to choose S, `layers/`
the ways to choose the layers: one file each, with one function `choose`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_lab import divergence
from moe_lab.moe import check_is_sum, condensed, expert_forward, expert_parameters
from moe_lab.progress import progress
from moe_lab.statistics import LayerStatistics
from moe_lab.stream import LayerStream, swapped
from moe_lab.types import Edit, UserError

TOKENS_AT_ONCE = 1024  # candidates are compared chunk by chunk, so that a chunk stays in the cache
Divergence = Callable[[Tensor, Tensor], Tensor]  # of moe_lab/divergence.py
Remember = Callable[[dict[str, Any], Callable[[], Any]], Any]


def option(kind: str, name: str) -> Callable:
    """The function `choose` of condense.<kind>=<name>; UserError lists what exists."""
    package = importlib.import_module(f"moe_lab.condense.{kind}")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    if name not in names:
        or_list = "" if kind == "gates" else ", or an explicit list of numbers"
        raise UserError(
            f"condense.{kind}={name!r} does not exist; there are {', '.join(names)}{or_list}"
        )
    return importlib.import_module(f"moe_lab.condense.{kind}.{name}").choose


def shared_gate(statistics: LayerStatistics) -> float:
    """The constant in place of a shared expert's sigmoid gate: its mean over all tokens, else 1."""
    if "shared_gate_sum" not in statistics.sums:
        return 1.0
    return float(statistics["shared_gate_sum"] / statistics["tokens"])


@dataclass(frozen=True)
class Choice:
    """Experts of one layer, or layers, in order of choice.

    divergence: after each choice, where the search looked at it; for experts the first one is that
    of the layer with no routed expert at all. For greedy_ppl it is a perplexity.
    """

    chosen: tuple[int, ...]
    divergence: tuple[float, ...] = ()


def ranked(scores: Iterable[float], number: int) -> Choice:
    """The positions of the highest scores, ties to the lower position."""
    scores = [float(score) for score in scores]
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return Choice(tuple(order[:number]))


# --------------------------------------------------------------------------- experts


@dataclass
class Candidates:
    """One MoE layer whose experts are to be chosen: what `experts/` may look at.

    gates_E: the constant gates; seed: of what is drawn. `open` gives the layer's activations on
    the calibration set and `experts` its experts module with weights: both cost a pass to there.
    """

    statistics: LayerStatistics
    gates_E: Tensor
    seed: int
    open: Callable[[], OpenLayer]
    experts: Callable[[], AbstractContextManager]

    @property
    def num_experts(self) -> int:
        """How many routed experts the layer has."""
        return self.statistics.info.num_experts


class OpenLayer:
    """An MoE layer of the intact model on the calibration tokens, with a growing set of experts.

    Every expert's output for every token is computed once; they, the intact output's probability
    and the output so far lie in the stream's cache, chunk by chunk: outputs [E, t, D], the others
    [t, D]. The output so far starts as the layer without routed experts (attention, residual, and
    the shared expert behind its constant gate).
    """

    def __init__(self, stream: LayerStream, index: int, gates_E: Tensor, shared_gate: float):
        self.cache, self.gates_E = stream.cache, gates_E
        self.finish = stream.finish if index == len(stream.layers) - 1 else lambda hidden: hidden
        self._layer, self._shared_gate = stream.moe[index], shared_gate
        self._weights: list[Tensor] = []  # per chunk, each token's share in the mean

    def add_batch(self, output_TD: Tensor, rest_TD: Tensor, x_TD: Tensor, weight_T: Tensor) -> None:
        """Take in the valid tokens of a batch, while the layer's weights are there."""
        parameters = expert_parameters(self._layer.experts)
        parts = (part.split(TOKENS_AT_ONCE) for part in (output_TD, rest_TD, x_TD, weight_T))
        for output, base, x, weight in zip(*parts, strict=True):
            if self._layer.shared is not None:
                base = base + self._layer.shared(x) * self._shared_gate
            chunk = len(self._weights)
            self.cache["target", chunk] = divergence.probability(self.finish(output))
            self.cache["base", chunk] = base
            outputs = [expert_forward(self._layer.experts, p, x) for p in parameters]
            self.cache["outputs", chunk] = torch.stack(outputs)
            self._weights.append(weight)

    def divergence(self, measure: Divergence) -> float:
        """Mean divergence of the output so far from the intact layer's."""
        total = 0.0
        for chunk, weight_T in enumerate(self._weights):
            value_T = measure(self.cache["target", chunk], self.finish(self.cache["base", chunk]))
            total += float(weight_T @ value_T.double())
        return total

    def divergences(self, measure: Divergence, experts: Sequence[int]) -> list[float]:
        """The same with each of `experts` added in turn."""
        sums = [0.0] * len(experts)
        for chunk, weight_T in enumerate(self._weights):
            u, base = self.cache["target", chunk], self.cache["base", chunk]
            outputs = self.cache["outputs", chunk]
            gates = self.gates_E.to(base)
            values = [
                weight_T @ measure(u, self.finish(base + gates[e] * outputs[e])).double()
                for e in experts
            ]
            sums = [a + b for a, b in zip(sums, torch.stack(values).tolist(), strict=True)]
        return sums

    def add(self, expert: int) -> None:
        """Add an expert behind its constant gate to the output so far."""
        for chunk in range(len(self._weights)):
            base = self.cache["base", chunk]
            gate = self.gates_E.to(base)[expert]
            self.cache["base", chunk] = base + gate * self.cache["outputs", chunk][expert]

    def close(self) -> None:
        """Give the memory back."""
        for chunk in range(len(self._weights)):
            for name in ("target", "base", "outputs"):
                self.cache.pop((name, chunk))


def greedy_experts(candidates: Candidates, num_routed: int, measure: Divergence) -> Choice:
    """Add, `num_routed` times, the expert that brings the layer's output closest to the intact one.

    Ties go to the lower expert. An expert that no calibration token was routed to has no mean gate:
    it is chosen only when others run out.
    """
    layer = candidates.open()
    chosen: list[int] = []
    values = [layer.divergence(measure)]
    for _ in range(num_routed):
        rest = [i for i in range(candidates.num_experts) if i not in chosen]
        rest = [i for i in rest if candidates.gates_E[i] != 0] or rest
        found = layer.divergences(measure, rest)
        best = min(range(len(rest)), key=found.__getitem__)
        chosen.append(rest[best])
        values.append(found[best])
        layer.add(rest[best])
    layer.close()
    return Choice(tuple(chosen), tuple(values))


class IntactStates:
    """Hidden states of the intact model, moving forward through its decoder layers once."""

    def __init__(self, stream: LayerStream):
        self.stream = stream
        self._next = 0  # the decoder layer whose input is known

    @torch.no_grad()
    def open(self, index: int, gates_E: Tensor, shared_gate: float) -> OpenLayer:
        """An MoE layer on the intact model's own states; layers are asked for in order."""
        for before in range(self._next, index):
            with self.stream.layer(before):
                for batch in range(self.stream.num_batches):
                    hidden = self.stream.replay(before, batch, self._input(before, batch))
                    self._set(before, batch, hidden)
        stream, opened = self.stream, OpenLayer(self.stream, index, gates_E, shared_gate)
        with stream.layer(index):
            check_is_sum(stream.moe[index])
            for batch in range(stream.num_batches):
                output, rest, x = stream.replay_open(index, batch, self._input(index, batch))
                valid, weight_T = stream.valid[batch], stream.token_weight[batch]
                opened.add_batch(output[valid], rest, x, weight_T)
                self._set(index, batch, output)
        self._next = index + 1
        return opened

    def _input(self, index: int, batch: int) -> Tensor:
        return self.stream.cache["intact" if index else "input", batch]

    def _set(self, index: int, batch: int, output: Tensor) -> None:
        self.stream.cache["intact", batch] = output


# --------------------------------------------------------------------------- layers


@dataclass
class Layers:
    """The MoE layers to choose from: what `layers/` may look at.

    statistics: by true index, in order; beam and seed: options. `condensed` gives the model with
    any set of them condensed, for which the experts of every layer are chosen first.
    """

    statistics: dict[int, LayerStatistics]
    condensed: Callable[[], CondensedSets]
    beam: int
    seed: int

    @property
    def indices(self) -> list[int]:
        """True indices of the MoE layers, in order."""
        return list(self.statistics)


def ranked_layers(indices: Sequence[int], harm: Sequence[float], num_layers: int) -> Choice:
    """The layers with the lowest harm, ties to the lower layer."""
    order = sorted(zip(harm, indices, strict=True))[:num_layers]
    return Choice(tuple(i for _, i in order), tuple(value for value, _ in order))


class CondensedSets:
    """The model with any set of its layers condensed, on the calibration set.

    Sets that agree on the first layers share their states there, within a question and with the
    set that was kept last: a decoder layer is computed once for each different way to reach it,
    and its weights come into memory once a question.
    """

    def __init__(
        self, open_stream: Callable[[], LayerStream], edits: dict[int, Edit], remember: Remember
    ):
        self.edits, self._open_stream, self._remember = edits, open_stream, remember
        self.evaluations = 0  # of decoder layers, over the whole calibration set
        self._kept: list[frozenset[int]] = [frozenset()]
        self._known: set[tuple[int, frozenset[int]]] = {(0, frozenset())}
        self._has_target = False

    @property
    def stream(self) -> LayerStream:
        """The model on the calibration set, opened only when something is not remembered."""
        return self._open_stream()

    def js(self, sets: Sequence[Collection[int]]) -> list[float]:
        """JS divergence of the last hidden state (after the final norm) for each set."""
        return self._asked("js", sets, lambda: self._divergences(sets, divergence.js))

    def kl(self, sets: Sequence[Collection[int]]) -> list[float]:
        """KL divergence of the last hidden state for each set."""
        return self._asked("kl", sets, lambda: self._divergences(sets, divergence.kl))

    def perplexity(self, sets: Sequence[Collection[int]]) -> list[float]:
        """Perplexity of the calibration text for each set."""

        def work() -> list[float]:
            found = self._at_end(sets, self.stream.next_token_loss)
            return [
                float(torch.tensor(sum(loss for loss, _ in one) / sum(n for _, n in one)).exp())
                for one in found
            ]

        return self._asked("perplexity", sets, work)

    def local_js(self) -> list[float]:
        """For each layer in order: its own output's JS divergence when it alone is condensed."""
        return self._asked("local_js", [[index] for index in self.edits], self._local_js)

    def keep(self, sets: Sequence[Collection[int]]) -> None:
        """Keep the states on the way to these sets: the next question begins there."""
        self._kept = [frozenset(one) for one in sets]

    def _asked(self, name: str, sets: Sequence[Collection[int]], work: Callable) -> list[float]:
        identity = {"question": name, "sets": [sorted(one) for one in sets]}
        return self._remember(identity, work)

    def _divergences(self, sets: Sequence[Collection[int]], measure: Divergence) -> list[float]:
        stream, cache = self.stream, self.stream.cache
        if not self._has_target:
            for batch, state in enumerate(self._last_states(frozenset())):
                cache["intact last", batch] = divergence.probability(state)
            self._has_target = True

        def value(batch: int, hidden: Tensor) -> float:
            state = stream.finish(hidden)[stream.valid[batch]]
            value_T = measure(cache["intact last", batch], state)
            return float(stream.token_weight[batch] @ value_T.double())

        return [sum(one) for one in self._at_end(sets, value)]

    def _last_states(self, one: frozenset[int]) -> list[Tensor]:
        def state(batch: int, hidden: Tensor) -> Tensor:
            return self.stream.finish(hidden)[self.stream.valid[batch]]

        return self._at_end([one], state)[0]

    @torch.no_grad()
    def _at_end(self, sets: Sequence[Collection[int]], look: Callable) -> list[list[Any]]:
        """For each set what `look(batch, last decoder layer's output)` gives for each batch."""
        wanted = [frozenset(one) for one in sets]
        end = len(self.stream.layers)
        needed: list[set[frozenset[int]]] = [set() for _ in range(end + 1)]
        needed[end] = set(wanted)
        for level in range(end, 0, -1):
            new = {one for one in needed[level] if (level, one) not in self._known}
            needed[level - 1] |= {one - {level - 1} for one in new}
            needed[level] = new
        found: dict[frozenset[int], list[Any]] = {}
        for level in range(end):
            self._advance(level, sorted(needed[level + 1], key=sorted))
            self._forget(level)
        batches = range(self.stream.num_batches)
        for one in wanted:
            found[one] = [look(batch, self.stream.cache[end, one, batch]) for batch in batches]
        self._forget(end)
        return [found[one] for one in wanted]

    def _advance(self, level: int, new: Sequence[frozenset[int]]) -> None:
        """Compute the states after decoder layer `level` for each of the sets `new`."""
        if not new:
            return
        with self.stream.layer(level):
            block = self._block(level) if any(level in one for one in new) else None
            for one in new:
                self.evaluations += 1
                with swapped(self.stream, level, block if level in one else None):
                    for batch in range(self.stream.num_batches):
                        hidden = self._state(level, one - {level}, batch)
                        output = self.stream.replay(level, batch, hidden)
                        self.stream.cache[level + 1, one, batch] = output
                self._known.add((level + 1, one))

    def _block(self, index: int) -> nn.Module:
        edit = self.edits[index]
        return condensed(self.stream.moe[index], edit.experts, edit.gates, edit.shared_gate)

    def _state(self, level: int, one: frozenset[int], batch: int) -> Tensor:
        key = (level, one, batch) if level else ("input", batch)
        return self.stream.cache[key]

    def _forget(self, level: int) -> None:
        """Drop the states before decoder layer `level` that are on the way to no kept set."""
        kept = {frozenset(i for i in one if i < level) for one in self._kept}
        for known in [k for k in self._known if k[0] == level and level and k[1] not in kept]:
            self._known.remove(known)
            for batch in range(self.stream.num_batches):
                self.stream.cache.pop((*known, batch))

    @torch.no_grad()
    def _local_js(self) -> list[float]:
        self._last_states(frozenset())
        stream, nothing, values = self.stream, frozenset(), []
        for index in self.edits:
            last = index == len(stream.layers) - 1
            finish = stream.finish if last else lambda hidden: hidden
            total = 0.0
            with stream.layer(index), swapped(stream, index, self._block(index)):
                self.evaluations += 1
                for batch in range(stream.num_batches):
                    valid = stream.valid[batch]
                    output = stream.replay(index, batch, self._state(index, nothing, batch))
                    intact = self._state(index + 1, nothing, batch)
                    u = divergence.probability(finish(intact)[valid])
                    value_T = divergence.js(u, finish(output)[valid])
                    total += float(stream.token_weight[batch] @ value_T.double())
            values.append(total)
        return values


def greedy_layers(
    sets: CondensedSets, num_layers: int, beam: int, values: Callable[[Sequence], list[float]]
) -> Choice:
    """Condense, `num_layers` times, the layer that gives the lowest value; ties to lower layers.

    beam: how many sets are carried on; 1 is the paper's forward selection.
    """
    paths: list[tuple[tuple[int, ...], tuple[float, ...]]] = [((), ())]
    for _ in progress(range(num_layers), "condense: choosing layers"):
        sets.keep([order for order, _ in paths])
        grown: dict[frozenset[int], tuple[tuple[int, ...], tuple[float, ...]]] = {}
        for order, past in paths:
            for index in sets.edits:
                if index not in order:
                    grown.setdefault(frozenset((*order, index)), ((*order, index), past))
        found = values([order for order, _ in grown.values()])
        steps = zip(found, grown.values(), strict=True)
        ranking = sorted((value, order, past) for value, (order, past) in steps)
        paths = [(order, (*past, value)) for value, order, past in ranking[:beam]]
    return Choice(*paths[0])
