"""knapsack.py: the least sum of errors under a budget."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from moe_lab.knapsack import NoRoom, best_choices


def by_trying_all(groups: list, budget: int) -> float:
    """The least sum of errors: every combination of choices is looked at."""
    places = itertools.product(*(range(len(group)) for group in groups))
    chosen = ([group[p] for group, p in zip(groups, some, strict=True)] for some in places)
    return min(sum(e for _, e in some) for some in chosen if sum(c for c, _ in some) <= budget)


def test_is_exact() -> None:
    drawn = np.random.default_rng(0)
    for _ in range(150):
        groups = [
            [(int(drawn.integers(0, 30)), float(drawn.choice([drawn.random(), 1.0, 2.0])))
             for _ in range(drawn.integers(1, 6))]
            for _ in range(drawn.integers(1, 6))
        ]  # fmt: skip
        least = sum(min(cost for cost, _ in group) for group in groups)
        budget = int(drawn.integers(least, least + 60))
        taken = [group[p] for group, p in zip(groups, best_choices(groups, budget), strict=True)]
        assert sum(cost for cost, _ in taken) <= budget
        assert sum(error for _, error in taken) == pytest.approx(by_trying_all(groups, budget))


def test_costs_of_gigabytes_differ_by_a_byte() -> None:
    groups = [[(2**40, 1.0), (2**40 + 1, 0.0)], [(2**40, 1.0), (2**40 + 1, 0.5)]]
    assert best_choices(groups, 2**41 + 1) == [1, 0]
    assert best_choices(groups, 2**41) == [0, 0]


def test_many_groups_take_seconds() -> None:
    drawn = np.random.default_rng(1)
    groups = [
        [(bits * 1000 + 7, float(scale * 4.0**-bits)) for bits in (2, 3, 4, 8)]
        for scale in drawn.gamma(0.5, size=500)
    ]
    taken = [group[p] for group, p in zip(groups, best_choices(groups, 500 * 3007), strict=True)]
    assert sum(cost for cost, _ in taken) <= 500 * 3007
    uniform = sum(group[1][1] for group in groups)
    assert sum(error for _, error in taken) < 0.9 * uniform


def test_refuses_what_nothing_fits_into() -> None:
    with pytest.raises(NoRoom) as caught:
        best_choices([[(3, 0.0)], [(5, 1.0), (4, 2.0)]], 6)
    assert caught.value.least == 7
