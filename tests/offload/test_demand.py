"""Policies on demand: against slow ones by their definitions, and the identities of caches."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from streams import by_chance, memory, slow_hits, stream

from moe_lab.offload.choosing import policy_of
from moe_lab.offload.demand import next_uses, requests_of
from moe_lab.offload.memory import Device
from moe_lab.offload.replay import HIT

DEMAND = ("lru", "lfu", "lfu_sequence", "lfu_resident", "min")


def hits(accesses, slots, name, **how):
    found = policy_of(name).replay(accesses, memory(accesses, slots, **how), Device())
    return found.outcome_A == HIT


@pytest.mark.parametrize("name", DEMAND)
@pytest.mark.parametrize("atomic", [True, False])
def test_each_policy_is_its_definition(name: str, atomic: bool) -> None:
    for seed, slots in itertools.product(range(3), (2, 3, 5, 9, 17, 18)):
        accesses = by_chance(seed)
        expected = slow_hits(accesses, slots, atomic, name)
        assert hits(accesses, slots, name, atomic=atomic).tolist() == expected, (seed, slots)


@pytest.mark.parametrize("name", DEMAND)
def test_with_room_for_all_only_the_first_use_of_each_misses(name: str) -> None:
    accesses = by_chance(1)
    missed = accesses.key_A[~hits(accesses, 18, name)]
    assert sorted(missed.tolist()) == sorted(set(accesses.key_A.tolist()))


@pytest.mark.parametrize("atomic", [True, False])
def test_no_policy_has_more_hits_than_min(atomic: bool) -> None:
    for seed, slots in itertools.product(range(4), (2, 4, 8, 12)):
        accesses = by_chance(seed)
        most = hits(accesses, slots, "min", atomic=atomic).sum()
        for name in DEMAND:
            assert hits(accesses, slots, name, atomic=atomic).sum() <= most


def test_min_is_the_best_of_all_that_could_be_done() -> None:
    """By trying every choice of what to evict."""
    for seed in range(6):
        accesses = by_chance(seed, passes=5, layers=2, experts=3)
        groups = [tuple(accesses.key_A[a:b].tolist())
                  for a, b in itertools.pairwise(accesses.start_V.tolist())]  # fmt: skip
        best = {frozenset[int](): 0}
        for needed in groups:
            after: dict[frozenset[int], int] = {}
            for cache, found in best.items():
                found += len(cache & set(needed))
                others = cache - set(needed)
                for kept in itertools.combinations(others, min(len(others), 3 - len(needed))):
                    state = frozenset(kept) | frozenset(needed)
                    after[state] = max(after.get(state, 0), found)
            best = after
        assert hits(accesses, 3, "min").sum() == max(best.values())


@pytest.mark.parametrize("name", ["lru", "lfu", "lfu_resident"])
def test_even_chance_hits_by_the_share_that_fits(name: str) -> None:
    rng = np.random.default_rng(0)
    accesses = stream([[[int(one)]] for one in rng.integers(40, size=20000)], 40, 1)
    for slots in (4, 20, 36):
        rate = hits(accesses, slots, name)[2000:].mean()
        assert rate == pytest.approx(slots / 40, abs=0.02)


def test_lru_by_uneven_chance_is_ches_approximation() -> None:
    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, 51) ** 0.8
    share /= share.sum()
    accesses = stream([[[int(one)]] for one in rng.choice(50, 30000, p=share)], 50, 1)
    for slots in (5, 15, 35):
        low, high = 0.0, 1e6
        for _ in range(100):  # sum_i 1 - exp(-p_i T) = C
            middle = (low + high) / 2
            full = (1 - np.exp(-share * middle)).sum() > slots
            low, high = (low, middle) if full else (middle, high)
        expected = (share * (1 - np.exp(-share * low))).sum()
        assert hits(accesses, slots, "lru")[2000:].mean() == pytest.approx(expected, abs=0.015)


def test_a_cycle_longer_than_the_cache_never_hits_lru() -> None:
    number, rounds = 10, 400
    accesses = stream([[[one]] for _ in range(rounds) for one in range(number)], number, 1)
    for slots in (3, 6, 9):
        assert not hits(accesses, slots, "lru").any()
        rate = hits(accesses, slots, "min")[number:].mean()
        assert rate == pytest.approx((slots - 1) / (number - 1), abs=0.01)


def test_decoding_is_a_cycle_over_layers() -> None:
    """A global LRU with room for no more than the other layers' top-k has no hits at all."""
    accesses = stream([[[0, 1]] * 4] * 50, 4, 2)  # the same experts at every step
    for slots in (2, 4, 6):
        assert not hits(accesses, slots, "lru").any()
        assert hits(accesses, 8, "lru")[8:].all()
    assert hits(by_chance(0), (3 - 1) * 2, "lru").sum() == 0


def test_a_cache_of_top_k_for_each_layer_has_what_the_last_step_needed() -> None:
    for seed in range(3):
        accesses = by_chance(seed, layers=4)
        found = hits(accesses, 4 * 2, "lru", per_layer=True)
        keys = accesses.key_A.reshape(-1, 4, 2)
        for step, layer in itertools.product(range(len(keys)), range(4)):
            before = set(keys[step - 1, layer].tolist()) if step else set()
            both = before & set(keys[step, layer].tolist())
            begin = (step * 4 + layer) * 2
            assert found[begin : begin + 2].sum() == len(both)


def test_a_visit_that_needs_more_than_fits_comes_one_by_one() -> None:
    accesses = stream([[[0, 1, 2, 3]], [[3, 0]]], 4, 2)
    asked = requests_of(accesses, np.arange(6), 3, atomic=True)
    assert asked.ends == [1, 2, 3, 4, 6] and asked.keys == [0, 1, 2, 3, 3, 0]
    assert hits(accesses, 3, "lru").tolist() == [False] * 4 + [True, False]
    assert requests_of(accesses, np.arange(6), 4, atomic=True).ends == [4, 6]


def test_where_an_expert_is_needed_next() -> None:
    assert next_uses([3, 1, 3, 3, 1]).tolist() == [2, 4, 3, 8, 6]


def test_bytes_and_seconds_are_those_of_the_misses() -> None:
    accesses = stream([[[0, 1], [0, 1]], [[0, 2], [0, 1]]], 3, 2)
    machine = Device(bandwidth=1e6, layer_seconds=0.5, token_seconds=0.25)
    found = policy_of("lru").replay(accesses, memory(accesses, 6), machine)
    assert found.moved_V.tolist() == [2000, 2000, 1000, 0]
    assert found.seconds_V.tolist() == pytest.approx([0.752, 0.752, 0.751, 0.75])
    assert found.most == 5
