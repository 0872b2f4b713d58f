"""Differences between the cells of a table and a baseline, and whether they are more than chance.

Where seeds differ, the reports of both cells are paired by them: a paired t-test. Elsewhere the
tasks of an average accuracy are the sample: an exact sign-flip test, which with few tasks says
nothing rather than too much (a bootstrap over four tasks calls 12 % of equal models different).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from moe_lab.report.figures import SHARES, is_truth, main_metric
from moe_lab.report.frame import (
    NONE,
    ORIGIN_KEYS,
    SEED_KEYS,
    keys_of,
    label_of,
    labels_of,
    mean_of,
    varying_keys,
)
from moe_lab.tables.pivot import Column, Labels, Pivot, settings_of
from moe_lab.types import UserError

DENSE, AVERAGE = "dense", "eval/average"
MOST_EXACT, NUM_DRAWS = 13, 9999
LEVELS = ((0.01, "**"), (0.05, "*"))
OVER_SEEDS, OVER_TASKS = "a paired t-test over seeds", "a sign-flip test over tasks"


@dataclass(frozen=True)
class Comparison:
    """Differences to one baseline, in the shape of the table's figures; NaN where there is none.

    p: two-sided, not corrected for the number of comparisons; tests: the kinds that were made.
    """

    baseline: str
    difference: pd.DataFrame
    p: pd.DataFrame
    tests: tuple[str, ...]

    def remark(self) -> str:
        """What a reader has to know of the numbers in brackets."""
        told = f"in brackets: difference to {self.baseline}"
        made = int(self.p.notna().sum().sum())
        if made:
            levels = ", ".join(f"{star} p < {level}" for level, star in reversed(LEVELS))
            told += (
                f"; {levels}, by {' or '.join(self.tests)}, "
                f"not corrected for the number of comparisons ({made})"
            )
        return told


def compare_to_baseline(made: Pivot, baseline: str) -> Comparison:
    """Every cell against `baseline`: "dense", or "key=value,key=value" for the cell with these.

    To dense: of each report's own dense model, figures of evaluation alone (the others are ratios
    to dense already). Figures of dense models are not compared. UserError for settings that the
    table does not have.
    """
    wanted = None if baseline == DENSE else _settings(made, baseline)
    sample = _Sample(made)
    difference, p = {}, {}
    tests: dict[str, None] = {}
    for column in made.columns:
        compared = [sample.compare(row, column, wanted) for row in made.rows()]
        difference[column.name] = [value for value, _, _ in compared]
        p[column.name] = [chance for _, chance, _ in compared]
        tests |= {test: None for _, _, test in compared if test}
    return Comparison(baseline, pd.DataFrame(difference), pd.DataFrame(p), tuple(tests))


def stars(p: float) -> str:
    """Nothing for chance, * and ** for what is rarely chance."""
    return next((star for level, star in LEVELS if p < level), "")


def paired(differences: Sequence[float]) -> float:
    """Two-sided p of a paired t-test; NaN for fewer than two pairs or no spread at all."""
    number = len(differences)
    if number < 2 or np.ptp(differences) <= 1e-12 * max(map(abs, differences)):
        return math.nan
    from scipy.special import stdtr  # scipy.stats would take a second to import

    t = np.mean(differences) / (np.std(differences, ddof=1) / math.sqrt(number))
    return float(2 * stdtr(number - 1, -abs(t)))


def sign_flips(differences: Sequence[float]) -> float:
    """Two-sided p that the mean is 0, each difference as likely with the other sign; NaN for none.

    Exact for up to 13 differences, by 9,999 random draws beyond. No p is below 2 / 2^n.
    """
    if not differences:
        return math.nan
    signs = _signs(len(differences))
    observed = abs(math.fsum(differences))
    as_far = np.abs(signs @ np.asarray(differences)) >= observed * (1 - 1e-12)
    drawn = len(signs) < 2 ** len(differences)
    return float((as_far.sum() + drawn) / (len(signs) + drawn))


@functools.cache
def _signs(number: int) -> np.ndarray:
    """Every way to give so many differences a sign, [2^n, n]; of more than 13 a draw of 9,999."""
    if number > MOST_EXACT:
        drawn = np.random.default_rng(0).integers(0, 2, (NUM_DRAWS, number), dtype=np.int8)
    else:
        drawn = (np.arange(2**number)[:, None] >> np.arange(number)) & 1
    return 1.0 - 2.0 * drawn


class _Sample:
    """The figures of a pivoted table's reports, paired with those of their baselines."""

    def __init__(self, made: Pivot):
        self.made = made
        varying = varying_keys(made.reports)
        inside = [key for key in varying if key not in made.labels and not ORIGIN_KEYS.match(key)]
        self.inside = {key: made.reports[key].map(label_of).tolist() for key in inside}
        self.tasks = _tasks(made.reports)

    def compare(
        self, row: Labels, column: Column, wanted: dict[str, str] | None
    ) -> tuple[float, float, str]:
        """Difference, p, and the test that was made; NaN and "" where there is none."""
        nothing = (math.nan, math.nan, "")
        variant, _, rest = column.key.partition("/")
        if variant == DENSE or is_truth(column.key):
            return nothing
        if wanted is None:
            key = f"{DENSE}/{rest}"
            if not rest.startswith("eval/") or key not in self.made.reports:
                return nothing
            base_row, base_column = row, Column(key, column.settings)
        else:
            base_row, base_column = self._replaced(row, column, wanted)
            if (base_row, base_column) == (row, column):
                return nothing
        mine, base = self.made.finished(row, column), self.made.finished(base_row, base_column)
        if not mine or not base:
            return nothing
        own, other = self.made.figures(column.key), self.made.figures(base_column.key)
        mean = _mean(own, mine) - _mean(other, base)
        p = paired(self._pairs(own, mine, other, base))
        if not math.isnan(p):
            return mean, p, OVER_SEEDS
        if rest != AVERAGE:
            return mean, math.nan, ""
        p = sign_flips(self._by_task(variant, mine, base_column.key.partition("/")[0], base))
        return mean, p, "" if math.isnan(p) else OVER_TASKS

    def _pairs(
        self, own: list[float], mine: list[int], other: list[float], base: list[int]
    ) -> list[float]:
        """Differences between reports that are alike in seeds, and in what else a cell mixes.

        Empty where no seed sets them apart. Of several reports that are alike, their mean.
        """
        keys = [key for key, labels in self.inside.items()
                if NONE not in {labels[at] for at in (*mine, *base)}]  # fmt: skip
        pairs: dict[tuple[str, ...], tuple[list[int], list[int]]] = {}
        for side, places in enumerate((mine, base)):
            for at in places:
                alike = tuple(self.inside[key][at] for key in keys)
                pairs.setdefault(alike, ([], []))[side].append(at)
        both = {alike: pair for alike, pair in pairs.items() if all(pair)}
        seeds = [place for place, key in enumerate(keys) if SEED_KEYS.search(key)]
        if not any(len({alike[place] for alike in both}) > 1 for place in seeds):
            return []
        return [_mean(own, one) - _mean(other, two) for one, two in both.values()]

    def _replaced(
        self, row: Labels, column: Column, wanted: dict[str, str]
    ) -> tuple[Labels, Column]:
        """The cell that has the wanted settings, and else those of this one."""
        keys = keys_of(self.made.index)
        base = tuple(wanted.get(key, own) for key, own in zip(keys, row, strict=True))
        settings = tuple((key, wanted.get(key, own)) for key, own in column.settings)
        return base, Column(column.key, settings)

    def _by_task(self, variant: str, mine: list[int], other: str, base: list[int]) -> list[float]:
        """The difference of each task that both have, on average over their reports."""
        differences = []
        for task in self.tasks:
            keys = [f"{name}/eval/{task}" for name in (variant, other)]
            if all(key in self.made.reports for key in keys):
                pair = zip(keys, (mine, base), strict=True)
                own, its = (_mean(self.made.figures(key), places) for key, places in pair)
                if not math.isnan(own - its):
                    differences.append(own - its)
        return differences


def _mean(figures: Sequence[float], places: Sequence[int]) -> float:
    return mean_of([figures[at] for at in places])


def _tasks(frame: pd.DataFrame) -> list[str]:
    """<task>/<metric> of the tasks with an accuracy; not the parts of another (mmlu_anatomy)."""
    metrics: dict[str, list[str]] = {}
    for key in keys_of(frame):
        _, _, rest = key.partition("/eval/")
        task, _, metric = rest.rpartition("/")
        if task and metric in SHARES:
            metrics.setdefault(task, []).append(metric)
    whole = [task for task in metrics if not any(task.startswith(f"{one}_") for one in metrics)]
    return [f"{task}/{main_metric(metrics[task])}" for task in whole]


def _settings(made: Pivot, baseline: str) -> dict[str, str]:
    """The settings that a baseline names."""
    keys = keys_of(made.labels)
    wanted = settings_of(baseline, keys)
    if not wanted:
        raise UserError(f"--baseline {baseline}: it is dense, or key=value of {', '.join(keys)}")
    for key, value in wanted.items():
        if value not in set(made.labels[key]):
            there = labels_of(made.labels[key])
            raise UserError(f"--baseline {baseline}: no report has {key}={value}; {key} is {there}")
    return wanted
