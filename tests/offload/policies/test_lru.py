"""LRU at every size agrees with one pass of stack distances: computed both ways."""

from __future__ import annotations

import numpy as np
from stack_distance import lru_hit_rates, stack_distances
from streams import by_chance, memory

from moe_lab.offload.choosing import policy_of
from moe_lab.offload.memory import Device
from moe_lab.offload.replay import HIT


def test_distances_are_counted_as_they_are_defined() -> None:
    keys = by_chance(3).key_A.tolist()
    found = stack_distances(keys)
    for place, key in enumerate(keys):
        before = [one for one in range(place) if keys[one] == key]
        expected = len(set(keys[before[-1] : place])) if before else 0
        assert found[place] == expected


def test_every_size_agrees_with_lru_itself() -> None:
    accesses = by_chance(4, passes=80)
    rates = lru_hit_rates(accesses.key_A.tolist())
    assert len(rates) == len(set(accesses.key_A.tolist())) + 1 and rates[0] == 0
    assert (np.diff(rates) >= 0).all()
    for slots in range(2, len(rates)):
        at = memory(accesses, slots, atomic=False)
        found = policy_of("lru").replay(accesses, at, Device()).outcome_A == HIT
        assert found.mean() == rates[slots]
