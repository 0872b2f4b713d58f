"""MoE-Infinity's collection and priorities: against slow references from the formulas."""

from __future__ import annotations

import numpy as np
import pytest
from streams import by_chance, memory, stream

from moe_lab.offload.activation import ActivationCollection, ActivationGuide, normalised
from moe_lab.offload.choosing import policy_of
from moe_lab.offload.memory import Device
from moe_lab.offload.replay import HIT
from moe_lab.offload.steered import HIGH, Visit


def slow_distance(stored: np.ndarray, now: np.ndarray, seen: list[int]) -> float:
    """1 - the mean over the layers seen of the cosine of row-normalised rows."""
    cosines = []
    for layer in seen:
        a = stored[layer] / (stored[layer].sum() + 1e-9)
        b = now[layer] / (now[layer].sum() + 1e-9)
        length = np.sqrt((a * a).sum()) * np.sqrt((b * b).sum())
        cosines.append((a * b).sum() / length if length else 0.0)
    return 1 - sum(cosines) / len(cosines)


def test_the_nearest_request_is_found_by_the_layers_seen() -> None:
    rng = np.random.default_rng(0)
    matrices = rng.integers(0, 5, (7, 3, 6)).astype(float)
    collection = ActivationCollection(3, 6, 10, of_code=False)
    assert collection.best(0) is None
    for one in matrices:
        collection.add(one)
    found = set()
    for _ in range(12):
        collection.forget_pass()
        now = np.zeros((3, 6))
        for layer in range(3):
            now[layer] = rng.integers(0, 3, 6)
            collection.see(layer, now[layer])
            distances = [slow_distance(one, now, list(range(layer + 1))) for one in matrices]
            nearest = int(np.argmin(distances))
            found.add(nearest)
            assert collection.best(layer) == pytest.approx(normalised(matrices[nearest]))
    assert len(found) > 2


def test_what_a_full_collection_drops() -> None:
    rng = np.random.default_rng(1)
    matrices, new = rng.random((3, 2, 4)), rng.random((2, 4))
    paper, code = (ActivationCollection(2, 4, 3, of_code) for of_code in (False, True))
    for one in matrices:
        paper.add(one)
        code.add(one)
    alike = int(np.argmin([slow_distance(one, new, [0, 1]) for one in matrices]))
    paper.add(new)
    assert paper.stored[alike] == pytest.approx(normalised(new))
    code.see(0, rng.random(4))
    assert code.best(0) == pytest.approx(normalised(matrices[0])), "compares what is not yet known"
    code.add(new)
    assert code.stored[1] == pytest.approx(normalised(new)), "the first that was never used"
    assert len(paper.stored) == len(code.stored) == 3


def test_priorities_are_the_formulas() -> None:
    accesses = by_chance(6, layers=4, experts=5)
    guides = {code: ActivationGuide(accesses, 10, True, code) for code in (False, True)}
    share = np.random.default_rng(2).random(20)
    share[13] = 0.0
    empty = np.zeros(0, np.int64)
    visit = Visit(9, 1, 0, empty, empty, empty)
    for code, guide in guides.items():
        guide.shares_K = share
        ahead = {
            key: (share[key] + 1e-8) * (1 - (key // 5 - 1) / (4 + code))
            for key in range(10, 20) if share[key] > 0
        }  # fmt: skip
        expected = sorted(ahead, key=lambda key: -ahead[key])
        assert list(guide.wanted(visit, None)) == [(key, HIGH) for key in expected]
        assert list(guide.wanted(Visit(9, 3, 0, empty, empty, empty), None)) == []
    keys = np.arange(20)
    kept = [(share[key] + 1e-8) * (1 - key // 5 / 4) for key in range(20)]
    assert guides[False].priorities(visit, keys) == pytest.approx(kept)


def test_the_released_code_evicts_by_uses_since_the_fetch() -> None:
    for seed, slots in ((0, 4), (1, 7), (2, 12)):
        accesses = by_chance(seed)
        at = memory(accesses, slots)
        one = policy_of("moe_infinity_code").replay(accesses, at, Device())
        other = policy_of("lfu_resident").replay(accesses, at, Device())
        assert (one.outcome_A == other.outcome_A).all()


def test_a_request_that_comes_again_is_foretold_whole() -> None:
    """From its second layer on, where the link is fast: all that is not there comes in time."""
    step = [[0, 1], [2, 3], [4, 5], [6, 7]]
    other = [[1, 2], [3, 4], [5, 6], [7, 0]]
    steps = [step, other, step]
    accesses = stream(steps, 8, 2, sequences=[0, 1, 2])
    at = memory(accesses, 8)
    found = policy_of("moe_infinity").replay(accesses, at, Device(bandwidth=1e12))
    assert (found.outcome_A[18:] == HIT).all()
    lru = policy_of("lru").replay(accesses, at, Device())
    assert not (lru.outcome_A[18:] == HIT).all()
