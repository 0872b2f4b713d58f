"""Reports pivoted: which reports fall into which cell, and what a cell's figures are.

Keys are those of report.json. A cell is the mean over the reports that fall into it, with the
sample standard deviation (n - 1).
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import pandas as pd

from moe_lab.option import Option
from moe_lab.report.figures import DEFAULT_VALUES, MISSING
from moe_lab.report.frame import (
    NONE,
    SEED_KEYS,
    STATUS,
    deviation_of,
    differs,
    distinct_reports,
    free_keys,
    keys_of,
    label_of,
    labels_of,
    mean_of,
    reason_of,
    setting_keys,
    varying_keys,
)
from moe_lab.report.report import OK
from moe_lab.types import UserError

logger = logging.getLogger(__name__)
LONGEST = 300  # characters of a reason below a table; a report has all of it
Labels = tuple[str, ...]  # its labels
At = tuple[tuple[str, str], ...]  # a column's settings


@dataclass(frozen=True)
class Request:
    """What a table is to look like; the `table` options of a sweep. Keys are those of report.json.

    Seeds are no rows by themselves; values are by default those of DEFAULT_VALUES that are there.
    A baseline "key=value,key=value" is the cell with these settings in the place of its own.
    """

    rows: Annotated[
        list[str] | None, Option("settings that make its rows, null for those that differ")
    ] = None
    columns: Annotated[
        list[str] | None, Option("settings that are spread out, a column for each value")
    ] = None
    values: Annotated[list[str] | None, Option("figures, null for the usual ones")] = None
    baseline: Annotated[
        list[str] | None, Option("what differences are told from, each dense or key=value")
    ] = None
    best: Annotated[
        list[str] | None,
        Option(
            "settings within which the best is bold, null for the model and how much is removed, "
            "[] for over all rows"
        ),
    ] = None
    expected: Annotated[str | None, Option("published figures to compare with, a CSV file")] = None
    filters: Annotated[
        dict[str, list[str]], Option("only reports in which each key is one of these")
    ] = field(default_factory=dict)
    sort: Annotated[
        list[str] | None, Option("keys of rows or values, - before one for descending")
    ] = None


@dataclass(frozen=True)
class Column:
    """A column of figures: a report's key, at these settings (label by key) where spread out."""

    key: str
    settings: At = ()

    @property
    def name(self) -> str:
        """`key`, or `key (setting=label, ...)`."""
        at = ", ".join(f"{name}={label}" for name, label in self.settings)
        return f"{self.key} ({at})" if at else self.key


@dataclass(frozen=True)
class Pivot:
    """Cells, a row of `index` (labels, a column for each key) by a `Column`.

    reports: those that the table is of; labels: theirs, as text, of rows and columns; ended: their
    statuses; numbers: what `figures` has read; cells: the positions of the
    reports in each cell that has some, by (row's labels, column's settings); mean, deviation: by
    the columns' names, NaN where there is none; repeated: reports that were left out, because
    another one is of the same job.
    """

    reports: pd.DataFrame
    index: pd.DataFrame
    columns: tuple[Column, ...]
    labels: pd.DataFrame
    ended: list[str]
    numbers: dict[str, list[float]]
    cells: Mapping[tuple[Labels, At], list[int]]
    mean: pd.DataFrame
    deviation: pd.DataFrame
    repeated: list[str]

    def rows(self) -> Iterator[tuple[str, ...]]:
        """The labels of each row."""
        yield from self.index.itertuples(index=False, name=None)

    def of_cell(self, row: tuple[str, ...], column: Column) -> list[int]:
        """The positions of all reports of a cell, failed ones too."""
        return self.cells.get((row, column.settings), [])

    def statuses(self, row: tuple[str, ...], column: Column) -> list[str]:
        """How the reports of a cell ended."""
        return [self.ended[position] for position in self.of_cell(row, column)]

    def figures(self, key: str) -> list[float]:
        """A figure of all reports, NaN where one has none or something else than a number."""
        if key not in self.numbers:
            column = pd.to_numeric(self.reports[key], errors="coerce")
            self.numbers[key] = column.astype(float).tolist()
        return self.numbers[key]

    def finished(self, row: tuple[str, ...], column: Column) -> list[int]:
        """The positions of those reports of a cell that went well and have its figure."""
        figures = self.figures(column.key)
        return [
            position
            for position in self.of_cell(row, column)
            if self.ended[position] == OK and not math.isnan(figures[position])
        ]


def pivot(frame: pd.DataFrame, request: Request = Request()) -> Pivot:
    """Reports as cells; UserError for a key that none of them has, or where none is left."""
    frame = filtered(frame, request.filters)
    _check_keys(frame, *(keys or () for keys in (request.rows, request.columns, request.values,
                                                 request.best)))  # fmt: skip
    if twice := [key for key in request.columns or () if key in (request.rows or ())]:
        raise UserError(f"{twice[0]} can stand in --rows or in --columns, not in both")
    frame, repeated = distinct_reports(frame)
    columns = list(dict.fromkeys(request.columns or ()))
    rows = list(dict.fromkeys(request.rows or ())) or [
        key for key in free_keys(frame) if key not in columns
    ]
    rows = rows or ["model"]
    values = list(request.values or ()) or [key for key in DEFAULT_VALUES if key in frame]
    values = values or [STATUS]
    _check_numbers(frame, values)

    labels = frame[[*rows, *columns]].map(label_of)
    cells: dict[tuple[Labels, At], list[int]] = {}
    at_columns: dict[At, None] = {}
    at_rows: dict[Labels, None] = {}
    for position, line in enumerate(labels.itertuples(index=False, name=None)):
        row, at = line[: len(rows)], tuple(zip(columns, line[len(rows) :], strict=True))
        cells.setdefault((row, at), []).append(position)
        at_rows[row] = at_columns[at] = None
    every = tuple(Column(key, at) for key in values for at in at_columns)
    index = pd.DataFrame(list(at_rows), columns=rows)
    ended = frame[STATUS].tolist()
    nothing = pd.DataFrame(index=index.index)
    made = Pivot(frame, index, every, labels, ended, {}, cells, nothing, nothing, repeated)
    mean, deviation = _spread(made)
    made = replace(made, mean=mean, deviation=deviation)
    return _sorted(made, request.sort) if request.sort else made


def _spread(made: Pivot) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Mean and deviation of every cell."""
    mean: dict[str, list[float]] = {}
    deviation: dict[str, list[float]] = {}
    for column in made.columns:
        figures = made.figures(column.key)
        cells = [[figures[at] for at in made.finished(row, column)] for row in made.rows()]
        mean[column.name] = list(map(mean_of, cells))
        deviation[column.name] = list(map(deviation_of, cells))
    return pd.DataFrame(mean), pd.DataFrame(deviation)


def filtered(frame: pd.DataFrame, filters: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """The reports that pass the filters; UserError for a key that none has, or if none is left."""
    _check_keys(frame, filters)
    for key, allowed in filters.items():
        whole = ",".join(allowed)  # of a value that has commas itself
        frame = frame[frame[key].map(label_of).isin([*allowed, whole])]
    if frame.empty:
        asked = (f"{key}={labels_of(allowed)}" for key, allowed in filters.items())
        raise UserError(f"no report has {' and '.join(asked)}")
    return frame


def possible(frame: pd.DataFrame, request: Request) -> Request:
    """The request without what no report has; a warning says what was left out.

    For the end of a sweep, whose table was asked for before anybody knew what its jobs would give
    (measure=none leaves out what a paper's table has).
    """
    wanted = {name: getattr(request, name) for name in ("rows", "columns", "values", "best")}
    there: dict[str, Any] = {
        name: keys and [key for key in keys if key in frame] for name, keys in wanted.items()
    }
    missing = [key for keys in wanted.values() for key in keys or () if key not in frame]
    baselines = [one for one in request.baseline or () if _is_there(frame, one)]
    missing += [one for one in request.baseline or () if one not in baselines]
    if missing:
        logger.warning("the table leaves out what no report has: %s", ", ".join(missing))
    return replace(request, **there, baseline=baselines)


def settings_of(text: str, keys: Iterable[str]) -> dict[str, str]:
    """key=value,key=value as a mapping; a comma that no key follows is part of the value.

    Empty where it does not begin with one of the keys.
    """
    one = "|".join(map(re.escape, sorted(keys, key=len, reverse=True)))
    parts = re.split(rf",(?=(?:{one})=)", text)
    settings = dict(part.partition("=")[::2] for part in parts)
    return settings if settings.keys() <= set(keys) and "=" in text else {}


def _is_there(frame: pd.DataFrame, baseline: str) -> bool:
    """Whether reports have the settings of a baseline; "dense" is always there."""
    asked = settings_of(baseline, setting_keys(frame))
    there = (value in set(frame[key].map(label_of)) for key, value in asked.items())
    return baseline == "dense" or (bool(asked) and all(there))


def remarks(made: Pivot) -> Iterator[str]:
    """What a reader has to know beside the cells: what was averaged, was the same, or failed."""
    frame, labels = made.reports, made.labels
    varying = varying_keys(frame)
    inside = [key for key in varying if key not in labels]
    ok = frame[frame[STATUS] == OK]
    of_cells = [labels.loc[ok.index, key] for key in keys_of(labels)]
    cells = ok.groupby(of_cells, sort=False)
    mixed = [key for key in inside if cells[key].agg(differs).any()]
    seed = SEED_KEYS.search
    for title, keys in (
        ("mean ± sample standard deviation over", [key for key in mixed if seed(key)]),
        ("cells also mix", [key for key in mixed if not seed(key)]),
        ("differs between cells", [key for key in inside if key not in mixed]),
    ):
        if keys:
            yield f"{title} {_told(frame, keys)}"
    if made.repeated:
        yield f"left out, the same job as another report: {', '.join(made.repeated)}"
    same = [key for key in setting_keys(frame) if key not in varying and key not in labels]
    given = [key for key in same if frame[key].notna().any()]
    yield f"the same in all {len(frame)} reports that have it: {_told(frame, given)}"
    for name, one in frame[frame[STATUS] != OK].iterrows():
        where = ", ".join(f"{key}={labels.at[name, key]!s}" for key in labels)
        yield f"{state([one[STATUS]])}: {where}: {_cut(reason_of(one))}"


def state(statuses: Sequence[str]) -> str:
    """What a cell without a figure says, by the statuses of its reports."""
    if not statuses:
        return MISSING
    if "failed" in statuses:
        return "failed"
    return MISSING if set(statuses) == {OK} else "unfinished"


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 2]} …"


def _told(frame: pd.DataFrame, keys: Sequence[str]) -> str:
    return "; ".join(f"{key}={labels_of(frame[key].dropna())}" for key in keys)


def _check_keys(frame: pd.DataFrame, *several: Iterable[str]) -> None:
    for key in (key for keys in several for key in keys):
        if key not in frame:
            settings = setting_keys(frame)
            results = [key for key in keys_of(frame) if key not in settings]
            raise UserError(
                f"no report has {key!r}; settings are {', '.join(settings)}; "
                f"results are {', '.join(results)}"
            )


def _check_numbers(frame: pd.DataFrame, values: Sequence[str]) -> None:
    for key in values:
        numbers = pd.to_numeric(frame[key], errors="coerce")
        if key != STATUS and numbers.isna().all() and frame[key].notna().any():
            raise UserError(f"{key} is no number in any report; it could be one of --rows")


def _sorted(made: Pivot, keys: Sequence[str]) -> Pivot:
    """The same with its rows in order of these keys, numbers as numbers, holes last."""
    order = list(range(len(made.index)))
    for key in reversed(keys):
        name, descending = key.removeprefix("-"), key.startswith("-")
        # A figure that is spread out sorts by the first of its columns.
        name = next((one.name for one in made.columns if one.key == name), name)
        column = made.index[name] if name in made.index else made.mean.get(name)
        if column is None:
            there = [*made.index, *made.mean]
            raise UserError(f"--sort {key}: the table has no {name!r}; it has {', '.join(there)}")
        order = _ordered(order, list(column), descending)
    frames = (made.index, made.mean, made.deviation)
    index, mean, deviation = (one.iloc[order].reset_index(drop=True) for one in frames)
    return replace(made, index=index, mean=mean, deviation=deviation)


def _ordered(order: list[int], values: list[Any], descending: bool) -> list[int]:
    """Stable: equal ones keep their order; numbers before words, and holes at the end."""

    def rank(position: int) -> tuple[int, float, str]:
        number = pd.to_numeric(values[position], errors="coerce")
        return (0, float(number), "") if pd.notna(number) else (1, 0.0, str(values[position]))

    def is_hole(position: int) -> bool:
        return values[position] in (NONE, None) or values[position] != values[position]

    there = [position for position in order if not is_hole(position)]
    there.sort(key=rank, reverse=descending)
    return there + [position for position in order if is_hole(position)]
