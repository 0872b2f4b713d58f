"""LExI's numbers: the optimum is that of trying all, and what it works on is what was asked."""

from __future__ import annotations

import itertools
import random

import pytest
from expert_sets import Case

from moe_lab.methods.skip import Skip
from moe_lab.methods.skipping.lexi import cheapest
from moe_lab.models.edits.top_k import SetTopK
from moe_lab.profile.fewer_experts import damage_on_random, damage_on_text


@pytest.mark.parametrize("seed", range(6))
def test_the_numbers_are_the_best_of_all(seed: int) -> None:
    draw = random.Random(seed)
    damage = [[draw.random() for _ in range(draw.randint(1, 4))] for _ in range(5)]
    for budget in range(5, sum(map(len, damage)) + 1):
        every = itertools.product(*(range(1, len(row) + 1) for row in damage))
        costs = {
            numbers: sum(row[k - 1] for row, k in zip(damage, numbers, strict=True))
            for numbers in every
            if sum(numbers) == budget
        }
        found = tuple(cheapest(damage, budget))
        assert sum(found) == budget
        assert costs[found] == pytest.approx(min(costs.values()), rel=1e-12)


def test_budgets_that_cannot_be_are_refused() -> None:
    for budget in (1, 6):
        with pytest.raises(ValueError, match=f"2 layers add up to {budget}"):
            cheapest([[1.0, 0.0], [1.0, 0.5, 0.0]], budget)
    assert cheapest([[1.0, 0.0], [1.0, 0.5, 0.0]], 5) == [2, 3]


@pytest.mark.parametrize(
    ("inputs", "measure"), [(None, None), ("text", None), ("text", "relative")]
)
def test_a_plan_spends_its_budget_on_what_was_measured(
    inputs: str | None, measure: str | None
) -> None:
    case = Case("qwen2_moe")
    method = Skip("lexi", average_top_k=2.4, inputs=inputs, damage=measure, seed=3)
    plan = method.plan(case.profile())
    damage = (
        damage_on_text(case.profile(), None, measure == "relative")
        if inputs
        else damage_on_random(case.profile(), 1024, 3)
    )
    for edit in plan.edits:
        assert isinstance(edit, SetTopK)
        assert edit.damage == tuple(damage[edit.index])
    numbers = [edit.top_k for edit in plan.edits]
    assert sum(numbers) == 7  # 2.4 * 3 layers, rounded
    assert numbers == cheapest([damage[edit.index] for edit in plan.edits], 7)
    assert plan.notes["inputs"] == (inputs or "random")
