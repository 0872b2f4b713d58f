"""Numbers of experts that evolve by agreement with the intact model."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from families import tiny_model
from layer_scores import scored
from running import Outcome

from moe_lab.methods.ratios import budget as ratios_budget
from moe_lab.methods.ratios.evolutionary import Evolutionary, first_generation, shared_out
from moe_lab.methods.ratios.uniform import Uniform
from moe_lab.models.edits.plan import Plan
from moe_lab.models.layers import moe_layers
from moe_lab.profile.intact_predictions import IntactPredictions
from moe_lab.profile.profile import Profile
from moe_lab.types import UserError

QUICK = {"num_samples": 2, "population": 4, "generations": 3, "parents": 2}


def test_evolution_keeps_the_total_and_finds_the_best() -> None:
    rooms, total, wanted = (6, 6, 3, 6), 10, (1, 5, 3, 1)
    seen = []

    def fitness(vector: tuple[int, ...]) -> float:
        seen.append(vector)
        return -sum((a - b) ** 2 for a, b in zip(vector, wanted, strict=True))

    search = Evolutionary(0.25, seed=3)
    best, path, forwards = search.evolve(rooms, total, fitness)
    assert best == wanted and path == sorted(path) and path[-1] == 0 and len(path) == 50
    assert forwards == len(seen) == len(set(seen))  # nothing is looked at twice
    assert all(sum(vector) == total for vector in seen)
    assert all(0 <= n <= room for vector in seen for n, room in zip(vector, rooms, strict=True))
    first = list(seen)
    seen.clear()
    search.evolve(rooms, total, fitness)
    assert seen == first
    seen.clear()
    Evolutionary(0.25, seed=4).evolve(rooms, total, fitness)
    assert seen != first


def test_the_first_generation_is_the_papers() -> None:
    import random

    found = first_generation([8] * 4, 8, 14, random.Random(0))
    assert found[0] == (2, 2, 2, 2)
    assert found[2] == (1, 2, 2, 3)  # 0.8 1.6 2.4 3.2: the rest goes to .8 and .6
    assert found[3] == (3, 2, 2, 1)
    assert found[8] == (3, 2, 2, 1)  # 3.2 1.6 1.6 1.6: two of the three .6
    assert len(found) == 14 and all(sum(vector) == 8 for vector in found)
    assert shared_out([100.0, 1.0, 1.0], [3, 8, 8], 7) == (3, 2, 2)
    assert shared_out([1.0, 1.0], [0, 5], 4) == (0, 4)


def test_evolved_numbers_agree_best(profile: Profile, batches: list) -> None:
    infos = [one.info for one in moe_layers(tiny_model("qwen2_moe"))]
    scores = scored(infos)
    search = Evolutionary(0.25, **(QUICK | {"population": 14, "generations": 6}))
    search.check(infos)
    found = search.numbers(scores, profile)
    assert sum(found.values()) == 18 and min(found.values()) >= 3
    assert found == search.numbers(scores, profile)
    notes = search.notes(scores, found)
    sample = IntactPredictions(tiny_model("qwen2_moe"), batches)
    assert notes["acceptance"][-1] == max(notes["acceptance"])
    assert sample.acceptance(ratios_budget.kept(scores, found)) == pytest.approx(
        notes["acceptance"][-1]
    )
    uniform = Uniform(0.25).numbers(scores, profile)
    assert sample.acceptance(ratios_budget.kept(scores, uniform)) <= notes["acceptance"][-1] + 1e-9
    assert notes["forwards"] <= 14 + 5 * 12
    for wrong, words in (
        ({"parents": 4}, r"ratio.parents=4: fewer than ratio.population=4"),
        ({"generations": 0}, r"ratio.generations=0: .*at least 1"),
    ):
        with pytest.raises(UserError, match=words):
            Evolutionary(0.25, **(QUICK | wrong)).check(infos)


def test_a_job_that_evolves_and_one_that_repeats_its_numbers(
    job: Callable[..., Outcome], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    asked = [f"ratio.{name}={value}" for name, value in QUICK.items()]
    done = job("metric=frequency", "ratio=evolutionary", *asked)
    assert done.code == 0, done.text
    assert "at most 8 forwards over 2 samples" in done.text
    path = next(done.store.glob("plan/*/plan.json"))
    first = json.loads(path.read_text())
    assert len(first["acceptance"]) == 3
    again = job("metric=frequency", "ratio=listed", f"ratio.plan={path}")
    assert again.code == 0, again.text
    (other,) = set(done.store.glob("plan/*/plan.json")) - {path}
    assert json.loads(other.read_text())["layers"] == first["layers"]
    listed = "{1:4,3:6}"
    done = job("metric=frequency", "ratio=listed", f"ratio.kept={listed}")
    assert done.code == 0, done.text
    (third,) = set(done.store.glob("plan/*/plan.json")) - {path, other}
    assert [len(edit.kept) for edit in Plan.load(third).edits] == [4, 8, 6]
