"""Differences to baselines, against means by hand and scipy's own tests; what chance does."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from moe_lab.tables.comparison import (
    OVER_SEEDS,
    OVER_TASKS,
    compare_to_baseline,
    paired,
    sign_flips,
    stars,
)
from moe_lab.tables.pivot import Pivot, Request, pivot

SEEDS, TASKS = range(4), ("a", "b", "c", "d", "e", "f")
GENERATOR = np.random.default_rng(1)
SCORES = {
    (metric, ratio, seed): GENERATOR.uniform(0.3, 0.9, len(TASKS))
    for metric in ("random", "reap", "l1")
    for ratio in (0.25, 0.5)
    for seed in (SEEDS if metric != "l1" else (0,))
}


def row(metric: str, ratio: float, seed: int, **more: Any) -> dict[str, Any]:
    tasks = SCORES[metric, ratio, seed]
    one = {"status": "ok", "error": None, "model": "m", "metric": metric, "ratio": ratio}
    one |= {"seed": seed, "dense/eval/average": 0.95, "dense/kl": 0.0}
    one |= {"compressed/eval/average": float(tasks.mean()), "compressed/kl": ratio + seed / 100}
    one |= {f"compressed/eval/{task}/acc": float(score)
            for task, score in zip(TASKS, tasks, strict=True)}  # fmt: skip
    one |= {f"compressed/eval/a_part_{number}/acc": 0.0 for number in range(3)}
    one |= {f"dense/eval/{task}/acc": 0.95 for task in TASKS}
    return one | more


@pytest.fixture
def frame() -> pd.DataFrame:
    rows = [row(*key) for key in SCORES]
    return pd.DataFrame(rows, index=[str(number) for number in range(len(rows))], dtype=object)


def made(frame: pd.DataFrame, **request: Any) -> Pivot:
    return pivot(frame, Request(**request))


def cell(table: Pivot, values: pd.DataFrame, key: str, *labels: str) -> float:
    return values[key][list(table.rows()).index(labels)]


KEY = "compressed/eval/average"


def test_a_baseline_is_the_row_that_is_alike_but_for_its_settings(frame: pd.DataFrame) -> None:
    table = made(frame)
    found = compare_to_baseline(table, "metric=random")
    for ratio in (0.25, 0.5):
        both = [
            np.mean([SCORES[metric, ratio, seed].mean() for seed in SEEDS])
            for metric in ("reap", "random")
        ]
        difference = cell(table, found.difference, KEY, "reap", str(ratio))
        assert difference == pytest.approx(both[0] - both[1])
        assert math.isnan(cell(table, found.difference, KEY, "random", str(ratio)))


def test_pairs_are_seeds_and_the_test_is_scipys(frame: pd.DataFrame) -> None:
    table = made(frame)
    found = compare_to_baseline(table, "metric=random")
    own, base = (
        [SCORES[metric, 0.5, seed].mean() for seed in SEEDS] for metric in ("reap", "random")
    )
    p = cell(table, found.p, KEY, "reap", "0.5")
    assert p == pytest.approx(stats.ttest_rel(own, base).pvalue)
    assert p != pytest.approx(stats.ttest_ind(own, base).pvalue)


def test_the_order_of_reports_does_not_matter(frame: pd.DataFrame) -> None:
    mixed = frame.sample(frac=1, random_state=3)
    tables = [made(one, sort=["metric", "ratio"]) for one in (frame, mixed)]
    found = [compare_to_baseline(table, "metric=random") for table in tables]
    pd.testing.assert_frame_equal(found[0].difference, found[1].difference)
    pd.testing.assert_frame_equal(found[0].p, found[1].p)


def test_without_seeds_the_sample_is_the_tasks(frame: pd.DataFrame) -> None:
    """l1 ran once: against the mean of random's seeds, task by task; parts of a task do not count.

    Against all sign flips, one by one.
    """
    table = made(frame)
    found = compare_to_baseline(table, "metric=random")
    random = np.mean([SCORES["random", 0.25, seed] for seed in SEEDS], axis=0)
    differences = SCORES["l1", 0.25, 0] - random
    means = [
        abs(np.mean(differences * signs)) for signs in itertools.product((1, -1), repeat=len(TASKS))
    ]
    expected = np.mean([mean >= abs(differences.mean()) - 1e-12 for mean in means])
    assert cell(table, found.p, KEY, "l1", "0.25") == pytest.approx(expected)
    assert set(found.tests) == {OVER_TASKS, OVER_SEEDS}
    assert math.isnan(cell(table, found.p, "compressed/kl", "l1", "0.25")), "no tasks of a KL"


def test_dense_is_each_reports_own(frame: pd.DataFrame) -> None:
    table = made(frame)
    found = compare_to_baseline(table, "dense")
    for metric in ("reap", "random"):
        mean = np.mean([SCORES[metric, 0.5, seed].mean() for seed in SEEDS])
        difference = cell(table, found.difference, KEY, metric, "0.5")
        assert difference == pytest.approx(mean - 0.95)
    assert found.difference["compressed/kl"].isna().all(), "a KL is to dense already"
    assert found.difference["dense/eval/average"].isna().all()


def test_a_baseline_may_stand_in_a_column(frame: pd.DataFrame) -> None:
    table = made(frame, columns=["ratio"], values=[KEY])
    found = compare_to_baseline(table, "ratio=0.25")
    assert found.difference[f"{KEY} (ratio=0.25)"].isna().all()
    own, base = (np.mean([SCORES["reap", ratio, seed].mean() for seed in SEEDS])
                 for ratio in (0.5, 0.25))  # fmt: skip
    difference = cell(table, found.difference, f"{KEY} (ratio=0.5)", "reap")
    assert difference == pytest.approx(own - base)


def test_a_failed_report_is_in_no_difference(frame: pd.DataFrame) -> None:
    frame.loc["0", ["status", "error"]] = ["failed", "broken"]  # random, 0.25, seed 0
    table = made(frame)
    found = compare_to_baseline(table, "metric=random")
    base = np.mean([SCORES["random", 0.25, seed].mean() for seed in (1, 2, 3)])
    own = np.mean([SCORES["reap", 0.25, seed].mean() for seed in SEEDS])
    assert cell(table, found.difference, KEY, "reap", "0.25") == pytest.approx(own - base)
    pairs = [
        SCORES["reap", 0.25, seed].mean() - SCORES["random", 0.25, seed].mean()
        for seed in (1, 2, 3)
    ]
    p = stats.ttest_1samp(pairs, 0).pvalue
    assert cell(table, found.p, KEY, "reap", "0.25") == pytest.approx(p)


def test_no_spread_is_no_certainty() -> None:
    assert math.isnan(paired([0.1, 0.1, 0.1]))
    assert math.isnan(paired([0.1]))
    assert sign_flips([0.1, 0.2, 0.3, 0.1]) == pytest.approx(2 / 2**4)
    assert (stars(0.04), stars(0.004), stars(0.06)) == (
        "*", "**", "",
    )  # fmt: skip


@pytest.mark.parametrize("number", [2, 3, 8, 13, 20])
def test_sign_flips_are_scipys_permutation_test(number: int) -> None:
    """Exactly up to 13 differences; beyond, both draw."""
    differences = np.random.default_rng(number).normal(0.3, 1, number)
    theirs = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", rng=np.random.default_rng(5)
    ).pvalue
    tolerance = 1e-12 if number <= 13 else 0.02
    assert sign_flips(list(differences)) == pytest.approx(theirs, abs=tolerance)


def test_sign_flips_keep_their_level_where_a_bootstrap_does_not() -> None:
    """Four tasks of two equal models: how often each calls them different at 5 %."""
    generator = np.random.default_rng(0)
    null = generator.normal(size=(200, 4))
    flips = np.mean([sign_flips(list(one)) < 0.05 for one in null])
    draws = generator.integers(0, 4, size=(1000, 4))
    means = null[:, draws].mean(axis=2)
    above = (means >= 0).mean(axis=1)
    bootstrap = np.mean(2 * np.minimum(above, 1 - above) < 0.05)
    assert flips == 0
    assert bootstrap > 0.1, "this is why it is not used"


def test_the_remark_says_how_it_was_tested(frame: pd.DataFrame) -> None:
    told = compare_to_baseline(made(frame), "metric=random").remark()
    assert told.startswith("in brackets: difference to metric=random; * p < 0.05, ** p < 0.01, by")
    assert "a paired t-test over seeds" in told and "a sign-flip test over tasks" in told
    assert "not corrected for the number of comparisons (4)" in told


def test_a_cell_that_mixes_more_than_seeds_is_paired_by_all_of_it(frame: pd.DataFrame) -> None:
    """Two ratios in a cell: differences at the same ratio and seed, or against itself for dense."""
    two = frame[frame["metric"] != "l1"]
    table = made(two, rows=["metric"], values=[KEY])
    found = compare_to_baseline(table, "metric=random")
    pairs = [
        SCORES["reap", ratio, seed].mean() - SCORES["random", ratio, seed].mean()
        for ratio in (0.25, 0.5) for seed in SEEDS
    ]  # fmt: skip
    p = stats.ttest_1samp(pairs, 0).pvalue
    assert cell(table, found.p, KEY, "reap") == pytest.approx(p)
    of_dense = compare_to_baseline(table, "dense")
    own = [SCORES["reap", ratio, seed].mean() - 0.95 for ratio in (0.25, 0.5) for seed in SEEDS]
    assert cell(table, of_dense.p, KEY, "reap") == pytest.approx(stats.ttest_1samp(own, 0).pvalue)


def test_without_a_seed_that_varies_no_test_is_of_seeds(frame: pd.DataFrame) -> None:
    one = frame[frame["seed"] == 0]
    found = compare_to_baseline(made(one, rows=["metric"], values=[KEY]), "metric=random")
    assert found.tests == (OVER_TASKS,)


def test_a_seed_of_one_side_alone_pairs_nothing(frame: pd.DataFrame) -> None:
    """As metric/seed, which only random has, and which is its seed."""
    told = frame.assign(**{"metric/seed": frame["seed"].where(frame["metric"] == "random", None)})
    plain, with_it = (
        compare_to_baseline(made(one, rows=["metric", "ratio"], values=[KEY]), "metric=random")
        for one in (frame, told)
    )
    assert set(with_it.tests) == {OVER_TASKS, OVER_SEEDS}
    pd.testing.assert_frame_equal(plain.p, with_it.p)
