"""A trace as what a cache of experts sees: visits of layers, and the experts that each needs.

A visit is one MoE layer in one forward pass. Each expert that it needs is one access, however many
tokens of the pass are sent to it. Letters: A accesses, V visits, K experts of all layers, which are
numbered one layer behind another.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_lab.trace.file import AHEAD_COLUMN, Trace
from moe_lab.trace.header import TraceHeader
from moe_lab.trace.recorder import NO_EXPERT


@dataclass(frozen=True)
class Accesses:
    """What a trace asks of a cache, in order.

    key_A: the expert; start_V: where the accesses of each visit begin, and their end, [V + 1];
    count_A: tokens that are sent to it; unimportance_A: HOBBIT's, the share of its token's gates
    that heavier experts have, of several tokens the least. Within a visit accesses stand as tokens,
    and for a token gates, first ask for them. layer_V: the place of the layer among the MoE layers;
    tokens_V: of the pass; decode_V: whether the pass decodes; sequence_V: number of the group of
    requests that are generated together. layer_K: the layer of each expert; ahead: for the next
    layer, the next but one, … of each visit the experts predicted there, as `Predicted`.
    """

    header: TraceHeader
    key_A: np.ndarray
    start_V: np.ndarray
    count_A: np.ndarray
    unimportance_A: np.ndarray
    layer_V: np.ndarray
    tokens_V: np.ndarray
    decode_V: np.ndarray
    sequence_V: np.ndarray
    layer_K: np.ndarray
    ahead: tuple[Predicted, ...] = ()

    @property
    def visit_A(self) -> np.ndarray:
        """The visit of each access."""
        return np.repeat(np.arange(len(self.layer_V)), np.diff(self.start_V))

    @property
    def first_L(self) -> np.ndarray:
        """The number of each layer's first expert."""
        first: np.ndarray = np.searchsorted(self.layer_K, np.arange(self.num_layers))
        return first

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        return len(self.header.layers)


@dataclass(frozen=True)
class Predicted:
    """Experts that are predicted at each visit: of visit v key[start_V[v] : start_V[v + 1]].

    first: whether some token's prediction names it as the heaviest.
    """

    start_V: np.ndarray
    key: np.ndarray
    first: np.ndarray

    def of(self, visit: int) -> tuple[np.ndarray, np.ndarray]:
        """The experts predicted at a visit, and which of them are some token's heaviest."""
        inside = slice(self.start_V[visit], self.start_V[visit + 1])
        return self.key[inside], self.first[inside]


def accesses_of(trace: Trace) -> Accesses:
    """The accesses of a trace."""
    layers = trace.header.layers
    layer_K = np.repeat(np.arange(len(layers)), [layer.experts for layer in layers])
    first_L = np.searchsorted(layer_K, np.arange(len(layers)))
    pass_R, place_R = trace.numbers("pass"), trace.layer_place
    visit_R = pass_R * len(layers) + place_R
    number = (int(pass_R.max()) + 1) * len(layers)
    experts, weights = trace.lists("experts"), trace.lists("weights").values
    shares = unimportance(experts.starts, weights.astype(np.float64))
    there = experts.values != NO_EXPERT
    rows, values = experts.rows[there], experts.values[there].astype(np.int64)
    visits, keys = visit_R[rows], values + first_L[place_R[rows]]
    start_V, key_A, inverse = _grouped(visits, keys, number, len(layer_K))
    least = np.full(len(key_A), np.inf)
    np.minimum.at(least, inverse, shares[there])
    one_R = np.zeros(number, np.int64)
    one_R[visit_R] = np.arange(len(trace))  # a row of each visit
    tokens_V = np.bincount(visit_R, minlength=number)
    steps_V = trace.numbers("step")[one_R]
    begins = (np.arange(number) % len(layers) == 0) & (steps_V == 0)
    return Accesses(
        header=trace.header,
        key_A=key_A,
        start_V=start_V,
        count_A=np.bincount(inverse, minlength=len(key_A)),
        unimportance_A=least,
        layer_V=np.arange(number) % len(layers),
        tokens_V=tokens_V,
        decode_V=steps_V > 0,
        sequence_V=np.cumsum(begins) - 1,
        layer_K=layer_K,
        ahead=tuple(
            _predicted(trace, distance, visit_R, first_L, number, len(layer_K))
            for distance in range(1, trace.header.lookahead + 1)
        ),
    )


def unimportance(starts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """HOBBIT's s_i = sum_{j < i} g_j of each token's gates g, normalised to 1, heaviest first.

    weights: those of token t at starts[t] to starts[t + 1]. (2411.01433, by secondary sources.)
    """
    before = np.concatenate([np.zeros(1), np.cumsum(weights)])
    token = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    begin, whole = before[starts[:-1]], before[starts[1:]] - before[starts[:-1]]
    whole = np.where(whole > 0, whole, 1.0)
    shares: np.ndarray = (before[:-1] - begin[token]) / whole[token]
    return shares


def _grouped(
    visits: np.ndarray, keys: np.ndarray, number: int, num_keys: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each visit's keys once, as they come first: starts [V + 1], keys [A]; and the A of each."""
    codes, first, inverse = np.unique(
        visits * num_keys + keys, return_index=True, return_inverse=True
    )
    order = np.argsort(first)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    ordered = codes[order]
    start_V = np.searchsorted(ordered // num_keys, np.arange(number + 1))
    return start_V, ordered % num_keys, place[inverse]


def _predicted(
    trace: Trace, distance: int, visit_R: np.ndarray, first_L: np.ndarray, number: int, keys: int
) -> Predicted:
    lists = trace.lists(AHEAD_COLUMN.format(distance))
    there = lists.values != NO_EXPERT
    rows, values = lists.rows[there], lists.values[there].astype(np.int64)
    heads = np.isin(np.flatnonzero(there), lists.starts[:-1])
    target = trace.layer_place[rows] + distance
    start_V, key, inverse = _grouped(visit_R[rows], values + first_L[target], number, keys)
    return Predicted(start_V, key, np.bincount(inverse, weights=heads, minlength=len(key)) > 0)
