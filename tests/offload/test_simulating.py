"""Policies over sizes, as one table."""

from __future__ import annotations

import pytest
from streams import SIZE, by_chance

from moe_lab.offload.memory import BYTES_OF_GIB, Device
from moe_lab.offload.simulating import Question, simulate
from moe_lab.types import UserError


def test_a_row_for_each_policy_and_size() -> None:
    accesses = by_chance(0)
    frame = simulate(accesses, Question(["lru", "min"], Device(), [9, 4, 99]))
    assert frame["policy"].tolist() == ["lru"] * 3 + ["min"] * 3
    assert frame["slots"].tolist() == [4, 9, 18] * 2
    assert frame["share"].tolist() == pytest.approx([4 / 18, 0.5, 1.0] * 2)
    rates = frame["decode/hit_rate"].tolist()
    assert rates == sorted(rates[:3]) + sorted(rates[3:]) and rates[0] <= rates[3]
    by_memory = Question(["lru"], Device(), memory=[9.5 * SIZE / BYTES_OF_GIB])
    told = simulate(accesses, by_memory)
    assert told["decode/hit_rate"].tolist() == rates[1:2] and told["slots"].tolist() == [9]
    assert told["memory_gib"].tolist() == [9.5 * SIZE / BYTES_OF_GIB]


def test_access_is_what_the_trace_says_unless_asked() -> None:
    accesses = by_chance(0)
    rows = [
        simulate(accesses, Question(["lfu"], Device(), [5], atomic=atomic)).iloc[0]
        for atomic in (None, True, False)
    ]
    hits = [row["decode/hits"] for row in rows]
    assert hits[0] == hits[1] != hits[2]


def test_nothing_is_replayed_before_all_can_be() -> None:
    accesses = by_chance(0)
    with pytest.raises(UserError, match="nothing is simulated without a size"):
        simulate(accesses, Question(["lru"], Device()))
    with pytest.raises(UserError, match="1 slots of one precision"):
        simulate(accesses, Question(["lru", "hobbit"], Device(), [9, 2]))
