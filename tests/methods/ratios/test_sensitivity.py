"""Numbers of experts by each layer's measured error."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable

import numpy as np
import pytest
from edited_models import pruned_logits
from families import tiny_model
from layer_scores import scored
from running import Outcome

from moe_lab.methods.ratios import budget as ratios_budget
from moe_lab.methods.ratios.sensitivity import Sensitivity, least_sum
from moe_lab.models.layers import moe_layers
from moe_lab.profile.profile import Profile
from moe_lab.types import UserError


def test_the_least_sum_is_the_least_of_all() -> None:
    generator = np.random.default_rng(0)
    for _ in range(30):
        curves = [generator.random(size) for size in generator.integers(1, 6, size=4)]
        rooms = [len(curve) - 1 for curve in curves]
        for total in range(sum(rooms) + 1):
            every = [places for places in itertools.product(*(range(r + 1) for r in rooms))
                     if sum(places) == total]  # fmt: skip
            sums = [sum(c[p] for c, p in zip(curves, places, strict=True)) for places in every]
            found = least_sum(curves, total)
            assert sum(found) == total
            assert tuple(found) == every[int(np.argmin(sums))]


def test_what_is_as_good_is_shared_evenly() -> None:
    for curve in (np.zeros(7), np.arange(7.0), np.arange(7.0) ** 2, np.arange(7.0) * 0.1):
        assert least_sum([curve] * 4, 12) == [3] * 4
        assert sorted(least_sum([curve] * 4, 13)) == [3, 3, 3, 4]


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_curves_are_those_of_pruned_models(family: str, batches: list) -> None:
    infos = [one.info for one in moe_layers(tiny_model(family))]
    scores = scored(infos)
    ratio = Sensitivity(0.4, num_samples=2, step=1)
    ratio.check(infos)
    profile = Profile([], open_model=lambda count: (tiny_model(family), batches[:count]))
    found = ratio.numbers(scores, profile)
    errors = ratio.notes(scores, found)["errors"]
    step = infos[0].groups
    for info, score in scores:
        curve = errors[str(info.index)]
        possible = range(8, ratios_budget.floor_of(info, None) - 1, -step)
        assert list(curve) == [str(number) for number in possible]
        assert curve["8"] == 0.0
        number = possible[-1]
        kept = {info.index: ratios_budget.best(info, score, number)}
        total = sum(
            float((p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum())
            for b in batches
            for p, q in [(pruned_logits(family, {}, b), pruned_logits(family, kept, b))]
        )
        count = sum(int(b["attention_mask"].sum()) for b in batches)
        assert curve[str(number)] == pytest.approx(total / count, rel=1e-4)
    assert sum(found.values()) == ratio.total(infos)
    predicted = sum(errors[str(index)][str(number)] for index, number in found.items())
    every = itertools.product(*(errors[str(info.index)].items() for info in infos))
    total = sum(found.values())
    sums = [sum(e for _, e in one) for one in every if sum(int(n) for n, _ in one) == total]
    assert predicted == pytest.approx(min(sums)) and len(sums) > 1
    assert found.found["predicted_error"] == pytest.approx(predicted)


def test_between_measured_numbers_lie_lines(profile: Profile) -> None:
    infos = [one.info for one in moe_layers(tiny_model("qwen2_moe"))]
    scores = scored(infos)
    whole = Sensitivity(0.25, num_samples=1, step=1).numbers(scores, profile).found
    some = Sensitivity(0.25, num_samples=1, step=3).numbers(scores, profile).found
    for index in some["errors"]:
        assert list(some["errors"][index]) == ["8", "5", "3"]
        assert some["errors"][index].items() <= whole["errors"][index].items()
    rounded = Sensitivity(0.25, num_samples=1, round_to=4).numbers(scores, profile)
    assert sorted(rounded.values()) == [4, 8, 8] or sorted(rounded.values()) == [4, 4, 8]
    for wrong, words in (({"error": "mse"}, "there are kl, output"), ({"step": 0}, "step=0")):
        with pytest.raises(UserError, match=words):
            Sensitivity(0.25, **wrong).check(infos)


@pytest.mark.parametrize("error", ["kl", "output"])
def test_a_job_that_measures_its_layers(job: Callable[..., Outcome], error: str) -> None:
    asked = ["metric=reap", "ratio=sensitivity", "ratio.num_samples=2", f"ratio.error={error}"]
    done = job(*asked)
    assert done.code == 0, done.text
    notes = json.loads(next(done.store.glob("plan/*/plan.json")).read_text())
    assert sum(len(edit["kept"]) for edit in notes["layers"]) == 18
    assert set(notes["errors"]) == {"1", "2", "3"} and notes["predicted_error"] > 0
    assert len(list(done.store.glob("search/*/answer.json"))) == 3
    again = job(*asked, "ratio.ratio=0.5")  # the same curves, another total
    assert again.code == 0, again.text
    assert len(list(done.store.glob("search/*/answer.json"))) == 3
    assert len(list(done.store.glob("plan/*/plan.json"))) == 2
