"""Prefetching and two precisions: against the plain loops, by hand, and invariants."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from streams import SIZE, by_chance, memory, stream

from moe_lab.offload import steered
from moe_lab.offload.choosing import policy_of
from moe_lab.offload.memory import Device
from moe_lab.offload.policies.hobbit import Hobbit, precision_of
from moe_lab.offload.policies.lru_prefetch import PrefetchingLRU
from moe_lab.offload.replay import HIT, LATE, LOW_HIT, LOW_MISS, MISS, SKIPPED
from moe_lab.offload.steered import HIGH, LOW, OMITTED
from moe_lab.types import UserError

SLOW_LINK = Device(bandwidth=1e3, layer_seconds=1.0, token_seconds=0.0)  # an expert a second
STEERED = ("lru_prefetch", "moe_infinity", "moe_infinity_code:prefetch=true", "hobbit")


@pytest.mark.parametrize("per_layer", [True, False])
def test_without_predictions_it_is_lru(per_layer: bool) -> None:
    for seed, slots in itertools.product(range(2), (6, 9, 15)):
        accesses = by_chance(seed)
        blind = type(accesses)(**{**vars(accesses), "ahead": ()})
        at = memory(accesses, slots, per_layer)
        one = policy_of("lru").replay(blind, at, SLOW_LINK)
        other = policy_of("lru_prefetch").replay(blind, at, SLOW_LINK)
        assert (one.outcome_A == other.outcome_A).all() and one.most == other.most
        assert (one.moved_V == other.moved_V).all()
        assert other.seconds_V == pytest.approx(one.seconds_V)


def test_what_was_foretold_comes_while_the_layer_before_computes() -> None:
    accesses = stream([[[0], [1]], [[0], [1]]], 3, 1, ahead=[[4], [], [4], []])
    at = memory(accesses, 3)
    found = PrefetchingLRU().replay(accesses, at, SLOW_LINK)
    assert found.outcome_A.tolist() == [MISS, HIT, HIT, HIT]
    assert found.seconds_V.tolist() == [2.0, 1.0, 1.0, 1.0], "a fetch, and four times computing"
    slower = Device(bandwidth=500.0, layer_seconds=1.0, token_seconds=0.0)
    found = PrefetchingLRU().replay(accesses, at, slower)
    assert found.outcome_A.tolist() == [MISS, LATE, HIT, HIT]
    assert found.seconds_V.tolist() == [3.0, 2.0, 1.0, 1.0], "it waits for what is on its way"
    assert found.moved_V.tolist() == [2 * SIZE, 0, 0, 0]


def test_a_wrong_prediction_costs_bytes_and_may_delay() -> None:
    accesses = stream([[[0], [1]]], 3, 1, ahead=[[5], []])
    found = PrefetchingLRU().replay(accesses, memory(accesses, 3), SLOW_LINK)
    assert found.outcome_A.tolist() == [MISS, MISS]
    assert found.moved_V.tolist() == [2 * SIZE, SIZE]
    slower = Device(bandwidth=500.0, layer_seconds=1.0, token_seconds=0.0)
    found = PrefetchingLRU().replay(accesses, memory(accesses, 3), slower)
    assert found.seconds_V.tolist() == [3.0, 4.0], "what began is finished first"


@pytest.mark.parametrize("name", STEERED)
@pytest.mark.parametrize("per_layer", [False, True])
def test_invariants(name: str, per_layer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more than the slots, nothing needed together goes, every access has an outcome."""
    accesses = by_chance(2, layers=3)
    room = steered.Simulation._make_room
    sizes = []

    def watched(self, pool, key, visit, needed, forced):
        before = [set(one) for one in pool.rooms]
        done = room(self, pool, key, visit, needed, forced)
        for old, new in zip(before, pool.rooms, strict=True):
            assert not (old - new) & needed and len(old - new) <= 1
            assert done is False or key not in new
        assert not done or len(pool.rooms[self.pools.room_K[key]]) < pool.slots
        assert sorted(pool.arrival) == sorted(set().union(*pool.rooms))
        sizes.append(max(map(len, pool.rooms)) <= pool.slots)
        return done

    monkeypatch.setattr(steered.Simulation, "_make_room", watched)
    at = memory(accesses, 12, per_layer)
    one = policy_of(name).replay(accesses, at, SLOW_LINK)
    other = policy_of(name).replay(accesses, at, SLOW_LINK)
    assert sizes and all(sizes)
    for first, second in ((one.outcome_A, other.outcome_A), (one.moved_V, other.moved_V),
                          (one.seconds_V, other.seconds_V)):  # fmt: skip
        assert (first == second).all()
    told = one.figures()
    words = ("hits", "misses", "low_hits", "low_misses", "late", "skipped")
    assert sum(told[f"decode/{word}"] for word in words) == len(accesses.key_A)
    assert (one.seconds_V >= 1.0 - 1e-9).all()
    moved = one.moved_V.sum() / SLOW_LINK.bandwidth
    assert one.seconds_V.sum() <= len(one.seconds_V) + moved + 1e-6, "waiting is for bytes alone"


def test_hobbits_rule_table() -> None:
    table = [(0.0, HIGH), (0.6, HIGH), (0.61, LOW), (0.9, LOW), (0.91, OMITTED), (1.0, OMITTED)]
    assert [precision_of(one, 0.6, 0.9) for one, _ in table] == [kind for _, kind in table]
    # Of two experts the second is high where g_1 <= T1, low up to T2, skipped above.
    gates = [(0.5, HIGH), (0.6, HIGH), (0.75, LOW), (0.9, LOW), (0.95, OMITTED)]
    for first, kind in gates:
        accesses = stream([[[0, 1]]], 40, 2, unimportance=[0.0, first])
        found = Hobbit(lookahead=0).replay(accesses, memory(accesses, 20), SLOW_LINK)
        expected = {HIGH: MISS, LOW: LOW_MISS, OMITTED: SKIPPED}[kind]
        assert found.outcome_A.tolist() == [MISS, expected]
        low = accesses.header.layers[0].bytes_at(4)
        moved = {HIGH: 2 * SIZE, LOW: SIZE + low, OMITTED: SIZE}[kind]
        assert found.moved_V.tolist() == [moved]


def test_hobbit_uses_a_high_copy_whatever_the_gate_and_no_low_one_where_high_is_due() -> None:
    steps = [[[0, 1]], [[1, 0]], [[0, 1]], [[1, 0]]]
    gates = [0.0, 0.7, 0.0, 0.95, 0.0, 0.7, 0.0, 0.7]
    accesses = stream(steps, 40, 2, unimportance=gates)
    found = Hobbit(lookahead=0).replay(accesses, memory(accesses, 20), SLOW_LINK)
    assert found.outcome_A.tolist() == [MISS, LOW_MISS, MISS, HIT, HIT, HIT, HIT, HIT]
    low = stream([[[0, 1]], [[2, 1]]], 40, 2, unimportance=[0.0, 0.7, 0.0, 0.7])
    found = Hobbit(lookahead=0).replay(low, memory(low, 20), SLOW_LINK)
    assert found.outcome_A.tolist() == [MISS, LOW_MISS, MISS, LOW_HIT]


def test_hobbits_priorities_are_their_weighted_sum() -> None:
    accesses = by_chance(5, layers=4, experts=5)
    how = Hobbit(recency=0.3, frequency=0.5, high=0.7, nearness=1.1)
    guide = how.guide(accesses)
    last: dict[int, int] = {}
    count: dict[int, int] = {}
    high: dict[int, int] = {}
    place, sequence = 0, 0
    for number in range(30):
        inside = slice(*accesses.start_V[number : number + 2])
        visit = steered.Visit(
            number, number % 4, int(accesses.sequence_V[number]), accesses.key_A[inside],
            accesses.count_A[inside], accesses.unimportance_A[inside],
        )  # fmt: skip
        guide.see(visit)
        if visit.sequence != sequence:
            sequence, count, high = visit.sequence, {}, {}
        for key, share in zip(visit.keys.tolist(), visit.unimportance.tolist(), strict=True):
            place += 1
            last[key] = place
            count[key] = count.get(key, 0) + 1
            high[key] = high.get(key, 0) + (share <= 0.6)
    expected = []
    for key in range(20):
        away = (key // 5 - visit.layer - 1) % 4 + 1
        expected.append(
            0.3 * last.get(key, 0) / place
            + 0.5 * count.get(key, 0) / max(count.values())
            + 0.7 * high.get(key, 0) / max(1, *high.values())
            + 1.1 * (1 - away / 4)
        )
    assert guide.priorities(visit, np.arange(20)) == pytest.approx(expected)


def test_hobbit_looks_for_the_first_layer_ahead_that_lacks_some() -> None:
    accesses = stream([[[0], [0], [0]]], 40, 1, ahead=[[40, 41], [80], []])
    guide = Hobbit().guide(accesses)
    pools = Hobbit().pools(memory(accesses, 20), accesses)
    visit = steered.Visit(0, 0, 0, *(np.array([0]),) * 3)
    assert list(guide.wanted(visit, pools)) == [(40, HIGH), (41, LOW)]
    assert guide.pinned() == {40, 41}
    pools.pools[HIGH].arrival |= {40: 0.0}
    assert list(guide.wanted(visit, pools)) == [(41, LOW)]


def test_two_pools_hold_no_more_than_fits_where_a_prompt_needs_most_experts() -> None:
    rng = np.random.default_rng(0)
    passes = [[rng.permutation(8)[: 2 if one % 3 else 7].tolist()] * 3 for one in range(30)]
    gates = [sorted([0.0, *rng.random(len(one) - 1)]) for layers in passes for one in layers]
    accesses = stream(passes, 8, 2, unimportance=list(itertools.chain.from_iterable(gates)))
    how = Hobbit()
    simulation = steered.Simulation(
        accesses, at := memory(accesses, 18, per_layer=True), SLOW_LINK, how.guide(accesses),
        how.pools(at, accesses),
    )  # fmt: skip
    moved, sizes = simulation._moved, set()

    def watched(pool, *arguments):
        arrival = moved(pool, *arguments)
        sizes.add(max(map(len, pool.rooms)) <= pool.slots)
        return arrival

    simulation._moved = watched
    simulation.run()
    assert sizes == {True}


def test_pools_too_small_are_refused() -> None:
    accesses = by_chance(0)
    with pytest.raises(UserError, match=r"1 slots of one precision, and a token needs 2 at once"):
        policy_of("hobbit").check(accesses, memory(accesses, 2))
    with pytest.raises(UserError, match=r"t1=0.95 is above t2=0.9"):
        policy_of("hobbit:t1=0.95")
