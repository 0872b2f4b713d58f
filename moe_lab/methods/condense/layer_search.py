"""The search for the layers to condense: only what differs between two models is computed.

CD-MoE (2412.00069) runs the whole model for every candidate; here candidates share the states of
all decoder layers up to the first in which they differ.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moe_lab.finite import check_number
from moe_lab.methods.condense import divergence
from moe_lab.methods.condense.divergence import Divergence, weighted_mean
from moe_lab.models.condensing import dense_terms
from moe_lab.models.editing import copied_layer
from moe_lab.models.edits.base import Edit
from moe_lab.models.opening import text_config
from moe_lab.models.predictions import divergence_terms, log_probabilities
from moe_lab.models.stream import LayerStream, swapped
from moe_lab.profile.profile import Answer
from moe_lab.progress import progress
from moe_lab.types import Choice, UserError

LOGITS_AT_ONCE = 2**24  # numbers of one distribution over the vocabulary, by positions


class Remembering(Protocol):
    """Gives what `work` gave for this identity before, or now."""

    def __call__(self, identity: dict[str, Any], work: Callable[[], Answer], /) -> Answer: ...


class CondensedSets:
    """The model with any set of its layers condensed, on the calibration set.

    edits: what condenses each layer; tensors: the plan's own, for edits that need some. Sets that
    agree on the first layers share their states there, within a question and with the set that was
    kept last: a decoder layer is computed once for each different way to reach it, and its weights
    come into memory once a question.
    """

    def __init__(
        self,
        open_stream: Callable[[], LayerStream],
        edits: Mapping[int, Edit],
        remember: Remembering,
        tensors: Mapping[str, Tensor] | None = None,
    ):
        self.edits, self._open_stream, self._remember = edits, open_stream, remember
        self._tensors = tensors or {}
        self.evaluations = 0  # of decoder layers, over the whole calibration set
        self._kept: list[frozenset[int]] = [frozenset()]
        self._known: set[tuple[int, frozenset[int]]] = {(0, frozenset())}
        self._has_target = False
        self._has_predictions = False

    @property
    def stream(self) -> LayerStream:
        """The model on the calibration set, opened only when something is not remembered."""
        stream = self._open_stream()
        stream.check_hidden_alone()
        return stream

    def js(self, sets: Sequence[Collection[int]]) -> list[float]:
        """JS divergence of the last hidden state (after the final norm) for each set."""
        return self._asked("js", sets, lambda: self._divergences(sets, divergence.js))

    def kl(self, sets: Sequence[Collection[int]]) -> list[float]:
        """KL divergence of the last hidden state for each set."""
        return self._asked("kl", sets, lambda: self._divergences(sets, divergence.kl))

    def perplexity(self, sets: Sequence[Collection[int]]) -> list[float]:
        """Perplexity of the calibration text for each set."""

        def work() -> list[float]:
            losses = self._at_end(sets, self.stream.next_token_loss)
            return [
                float(torch.tensor(sum(loss for loss, _ in one) / sum(n for _, n in one)).exp())
                for one in losses
            ]

        return self._asked("perplexity", sets, work)

    def logits_kl(self, sets: Sequence[Collection[int]]) -> list[float]:
        """KL(intact || condensed) of the next token's distribution for each set, in nats.

        The mean over all positions that predict a token of the text: all but the last one of each
        document. Temperature 1, with all that the family does to its logits.
        """
        return self._asked("logits_kl", sets, lambda: self._logits_kl(sets))

    def local_js(self) -> list[float]:
        """For each layer in order: its own output's JS divergence when it alone is condensed."""
        return self._asked("local_js", [[index] for index in self.edits], self._local_js)

    def keep(self, sets: Sequence[Collection[int]]) -> None:
        """Keep the states on the way to these sets: the next question begins there."""
        self._kept = [frozenset(one) for one in sets]

    def _asked(
        self, name: str, sets: Sequence[Collection[int]], work: Callable[[], list[float]]
    ) -> list[float]:
        identity = {"question": name, "sets": [sorted(one) for one in sets]}

        def known() -> list[float]:
            values = work()
            for one, value in zip(sets, values, strict=True):
                if value != value:  # an infinite perplexity is one that is not chosen
                    check_number(value, f"{name} with layers {sorted(one)} condensed")
            return values

        return self._remember(identity, known)

    def _divergences(self, sets: Sequence[Collection[int]], measure: Divergence) -> list[float]:
        stream, cache = self.stream, self.stream.cache
        if not self._has_target:
            for batch, state in enumerate(self._last_states(frozenset())):
                cache["intact last", batch] = divergence.probability(state)
            self._has_target = True

        def value(batch: int, hidden: Tensor) -> float:
            state = stream.finish(hidden)[stream.valid[batch]]
            value_T = measure(cache["intact last", batch], state)
            return float(weighted_mean(stream.token_weight[batch], value_T))

        return [sum(one) for one in self._at_end(sets, value)]

    @torch.no_grad()
    def _logits_kl(self, sets: Sequence[Collection[int]]) -> list[float]:
        """The intact distribution of some positions is computed once for all sets, never kept."""
        stream, totals = self.stream, [0.0] * len(sets)
        self._keep_intact_output()
        number = sum(int(stream.targets(batch).sum()) for batch in range(stream.num_batches))
        if not number:
            raise UserError(
                "the calibration set has no next token to predict: its samples have one token each "
                "(calibration.max_length)"
            )
        with self._reached(sets) as states:
            for batch in range(stream.num_batches):
                predicts = stream.targets(batch)
                ids_N = stream.input_ids[batch][predicts]
                intact_ND = stream.cache["intact output", batch]
                some = [states(one, batch)[predicts] for one in sets]
                for place, value in enumerate(_of_predictions(stream, ids_N, intact_ND, some)):
                    totals[place] += value
        return [total / number for total in totals]

    def _keep_intact_output(self) -> None:
        """Keep what the intact model's last decoder layer gives where something is predicted."""
        if self._has_predictions:
            return
        with self._reached([frozenset()]) as states:
            for batch in range(self.stream.num_batches):
                intact_ND = states(frozenset(), batch)[self.stream.targets(batch)]
                self.stream.cache["intact output", batch] = intact_ND
        self._has_predictions = True

    def _last_states(self, one: frozenset[int]) -> list[Tensor]:
        def state(batch: int, hidden: Tensor) -> Tensor:
            return self.stream.finish(hidden)[self.stream.valid[batch]]

        return self._at_end([one], state)[0]

    @torch.no_grad()
    def _at_end(
        self, sets: Sequence[Collection[int]], look: Callable[[int, Tensor], Answer]
    ) -> list[list[Answer]]:
        """For each set what `look(batch, last decoder layer's output)` gives for each batch."""
        batches = range(self.stream.num_batches)
        with self._reached(sets) as states:
            return [[look(batch, states(one, batch)) for batch in batches] for one in sets]

    @contextmanager
    @torch.no_grad()
    def _reached(
        self, sets: Sequence[Collection[int]]
    ) -> Iterator[Callable[[Collection[int], int], Tensor]]:
        """The last decoder layer's output [B, L, D] by set and batch, while it is open."""
        wanted = [frozenset(one) for one in sets]
        end = len(self.stream.layers)
        needed: list[set[frozenset[int]]] = [set() for _ in range(end + 1)]
        needed[end] = set(wanted)
        for level in range(end, 0, -1):
            new = {one for one in needed[level] if (level, one) not in self._known}
            needed[level - 1] |= {one - {level - 1} for one in new}
            needed[level] = new
        for level in range(end):
            self._advance(level, sorted(needed[level + 1], key=sorted))
            self._forget(level)
        yield lambda one, batch: self.stream.cache[end, frozenset(one), batch]
        self._forget(end)

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
        """What stands at a layer after its edit; the layer itself stays as it is."""
        edit, layer = self.edits[index], self.stream.moe[index]
        if edit.leaves_moe or dense_terms(layer) is None:  # then its own block would be changed
            layer = copied_layer(layer)
        return edit.apply(layer, self._tensors)

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
        nothing: frozenset[int] = frozenset()
        stream, values = self.stream, []
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
                    total += float(weighted_mean(stream.token_weight[batch], value_T))
            values.append(total)
        return values


def _of_predictions(
    stream: LayerStream, ids_N: Tensor, intact_ND: Tensor, some: Sequence[Tensor]
) -> list[float]:
    """For each of `some` [N, D] the sum over positions of KL(intact || it), of their logits."""
    totals = [0.0] * len(some)
    vocabulary = text_config(stream.model.config).vocab_size
    for chunk_n in torch.arange(len(ids_N)).split(max(1, LOGITS_AT_ONCE // vocabulary)):
        log_p = log_probabilities(stream.logits_of(intact_ND[chunk_n], ids_N[chunk_n]))
        for place, states_ND in enumerate(some):
            log_q = log_probabilities(stream.logits_of(states_ND[chunk_n], ids_N[chunk_n]))
            totals[place] += float(divergence_terms(log_p, log_q).sum(dtype=torch.float64))
    return totals


def greedy_layers(
    sets: CondensedSets,
    num_layers: int,
    beam: int,
    values: Callable[[Sequence[Collection[int]]], list[float]],
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
        reached = values([order for order, _ in grown.values()])
        steps = zip(reached, grown.values(), strict=True)
        ranking = sorted((value, order, past) for value, (order, past) in steps)
        paths = [(order, (*past, value)) for value, order, past in ranking[:beam]]
    return Choice(*paths[0])
