"""Accesses made up by hand or by chance, and slow policies written from their definitions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_lab.offload.accesses import Accesses, Predicted
from moe_lab.offload.memory import Memory, memory_of
from moe_lab.trace.header import TracedLayer, TraceHeader

SIZE = 1000  # bytes of an expert


def header(layers: int, experts: int, top_k: int, **changes: Any) -> TraceHeader:
    layer = TracedLayer(0, experts, top_k, False, SIZE // 2, SIZE)
    every = tuple(TracedLayer(**{**vars(layer), "index": one}) for one in range(layers))
    values = dict(
        model="m", family="f", dtype="float32", layers=every, resident_bytes=0, tokenizer="",
        data="", seed=0, requests=1, new_tokens=1, lookahead=1, batch_size=1, access="atomic",
    )  # fmt: skip
    return TraceHeader(**(values | changes))


def stream(
    passes: Sequence[Sequence[Sequence[int]]],
    experts: int,
    top_k: int,
    sequences: Sequence[int] | None = None,
    unimportance: Sequence[float] | None = None,
    ahead: Sequence[Sequence[int]] | None = None,
) -> Accesses:
    """Passes of layers of experts, all of them decoding; ahead: keys predicted at each visit."""
    layers = len(passes[0])
    visits = [
        [layer * experts + expert for expert in chosen]
        for one in passes
        for layer, chosen in enumerate(one)
    ]
    keys = np.array(list(itertools.chain.from_iterable(visits)), np.int64)
    number = len(visits)
    given = list(range(len(passes))) if sequences is None else list(sequences)
    sequence = np.repeat(np.zeros(len(passes), int) if sequences is None else given, layers)
    predicted = () if ahead is None else (_predicted(ahead),)
    return Accesses(
        header(layers, experts, top_k), keys, np.cumsum([0, *map(len, visits)]),
        np.ones(len(keys), np.int64),
        np.zeros(len(keys)) if unimportance is None else np.array(unimportance, float),
        np.tile(np.arange(layers), len(passes)), np.ones(number, np.int64),
        np.ones(number, bool), sequence, np.repeat(np.arange(layers), experts), predicted,
    )  # fmt: skip


def _predicted(ahead: Sequence[Sequence[int]]) -> Predicted:
    keys = np.array(list(itertools.chain.from_iterable(ahead)), np.int64)
    first = [place == 0 for one in ahead for place in range(len(one))]
    return Predicted(np.cumsum([0, *map(len, ahead)]), keys, np.array(first, bool))


def by_chance(
    seed: int, passes: int = 60, layers: int = 3, experts: int = 6, top_k: int = 2
) -> Accesses:
    """Experts drawn unevenly, with predictions that are often right, in four sequences."""
    rng = np.random.default_rng(seed)
    share = rng.dirichlet(np.full(experts, 0.7), layers)
    drawn = [
        [rng.choice(experts, top_k, replace=False, p=_even(share[layer])).tolist()
         for layer in range(layers)] for _ in range(passes)
    ]  # fmt: skip
    flat = [[layer * experts + one for one in chosen] for each in drawn
            for layer, chosen in enumerate(each)]  # fmt: skip
    ahead = [
        flat[place + 1] if rng.random() < 0.7 and (place + 1) % layers
        else [(place + 1) % layers * experts + int(rng.integers(experts))][: (place + 1) % layers]
        for place in range(len(flat))
    ]  # fmt: skip
    unimportance = list(itertools.chain.from_iterable(
        sorted([0.0, *rng.random(top_k - 1)]) for _ in flat))  # fmt: skip
    sequences = [one * 4 // passes for one in range(passes)]
    return stream(drawn, experts, top_k, sequences, unimportance, ahead)


def _even(share: np.ndarray) -> np.ndarray:
    """No expert so unlikely that two different ones could not be drawn."""
    return (share + 0.01) / (share + 0.01).sum()


def memory(accesses: Accesses, slots: int, per_layer: bool = False, atomic: bool = True) -> Memory:
    return memory_of(accesses, slots, per_layer=per_layer, atomic=atomic)


def slow_hits(accesses: Accesses, slots: int, atomic: bool, kind: str) -> list[bool]:
    """Of lru, lfu, lfu_sequence, lfu_resident or min: written from their definitions, no faster.

    Every eviction looks at all that is in the cache.
    """
    keys, sequence = accesses.key_A.tolist(), accesses.sequence_V[accesses.visit_A].tolist()
    groups = _groups(accesses, slots, atomic)
    cache: set[int] = set()
    last: dict[int, int] = {}
    count: dict[int, int] = {}
    found = [False] * len(keys)
    for places in groups:
        if kind == "lfu_sequence" and places[0] and sequence[places[0]] != sequence[places[0] - 1]:
            count = {}
        needed = {keys[place] for place in places}
        there = set(cache)
        for place in places:
            key = keys[place]
            found[place] = key in there
            last[key] = place
            count[key] = 1 if kind == "lfu_resident" and key not in there else count.get(key, 0) + 1
        for place in places:
            if (key := keys[place]) in cache:
                continue
            if len(cache) == slots:
                others = cache - needed
                if kind == "lru":
                    gone = min(others, key=lambda one: last[one])
                elif kind == "min":
                    behind = keys[places[-1] + 1 :]
                    gone = max(
                        others, key=lambda one: behind.index(one) if one in behind else 10**9 + one
                    )
                else:
                    gone = min(others, key=lambda one: (count.get(one, 0), last[one]))
                cache.discard(gone)
            cache.add(key)
    return found


def _groups(accesses: Accesses, slots: int, atomic: bool) -> list[list[int]]:
    starts = accesses.start_V.tolist()
    groups = []
    for begin, end in itertools.pairwise(starts):
        places = list(range(begin, end))
        if atomic and len(places) <= slots:
            groups += [places] if places else []
        else:
            groups += [[place] for place in places]
    return groups
