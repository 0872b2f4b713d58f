"""LRU at every size of the cache from one pass: Mattson's stack distances (1970).

An access is a hit in an LRU cache of C slots exactly where at most C different experts, itself
counted, were asked for since its last use.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def stack_distances(keys: Sequence[int]) -> np.ndarray:
    """Different experts from each access's last use to it, itself counted; 0 where it is the first.

    Computed by counting, in a tree of sums over positions, those that are an expert's latest.
    """
    number = len(keys)
    tree = [0] * (number + 1)
    latest: dict[int, int] = {}
    found = np.zeros(number, np.int64)
    for place, key in enumerate(keys, start=1):
        before = latest.get(key)
        if before is not None:
            found[place - 1] = len(latest) - _total(tree, before) + 1
            _add(tree, before, -1)
        _add(tree, place, 1)
        latest[key] = place
    return found


def lru_hit_rates(keys: Sequence[int]) -> np.ndarray:
    """The share of hits of an LRU cache with 0, 1, … slots, up to one for each expert."""
    distances = stack_distances(keys)
    counts = np.bincount(distances, minlength=len(set(keys)) + 1)
    counts[0] = 0
    rates: np.ndarray = np.cumsum(counts) / max(1, len(distances))
    return rates


def _add(tree: list[int], place: int, value: int) -> None:
    while place < len(tree):
        tree[place] += value
        place += place & -place


def _total(tree: list[int], place: int) -> int:
    total = 0
    while place:
        total += tree[place]
        place -= place & -place
    return total
