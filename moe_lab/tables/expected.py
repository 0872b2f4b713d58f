"""Published figures beside ours: a CSV file of what was expected, against the reports of a sweep.

The file's columns are settings of reports (a report matches a row whose non-empty cells equal its
own values, as text or as numbers; "none" is the absence of a value) and these: `figure`, a key of
reports, or plain words for what no report has; `value`, `std` and `tolerance` in the report's
units; `table`, `variant`, `provenance`, `sure` and `note`, which are told.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from moe_lab.files import CHECKOUT
from moe_lab.report.figures import MISSING, difference_text, figure_text
from moe_lab.report.frame import NONE, STATUS, deviation_of, keys_of, label_of, mean_of
from moe_lab.report.report import OK
from moe_lab.tables.pivot import Column
from moe_lab.tables.table import Table
from moe_lab.types import UserError

EXPERIMENTS = CHECKOUT / "experiments"
TOLD_COLUMNS = ("table", "variant", "provenance", "sure", "note")
FIGURE_COLUMNS = ("figure", "value", "std", "tolerance")
SHOWN = ("published", "ours", "difference", "tolerance", "within")
WITHIN = {True: "yes", False: "NO", None: MISSING}
FileRow = dict[str, Any]  # of the file, and ours beside it


def compare_to_published(frame: pd.DataFrame, path: Path) -> Table:
    """Each expected figure that a finished report of `frame` has, beside ours.

    path: also relative to experiments/.
    Ours is the mean over the reports that match, with their deviation. What the reports do not have
    is counted below. UserError for a file that cannot be read as described.
    """
    expected = _read(path)
    asked = [key for key in keys_of(expected) if key not in (*TOLD_COLUMNS, *FIGURE_COLUMNS)]
    rows, lacking = _beside_ours(expected, asked, frame)
    unknown = [key for key in asked if key not in frame]
    notes = (*_notes(rows, lacking, path), *(
        f"no report has {key}, which {path.name} asks for" for key in unknown
        if any(one not in ("", NONE) for one in expected[key])
    ))  # fmt: skip
    return _table(expected, asked, rows, notes)


def _beside_ours(
    expected: pd.DataFrame, asked: list[str], frame: pd.DataFrame
) -> tuple[list[FileRow], Counter[str]]:
    """The rows of the file that have one of ours beside them; why the others have none, counted.

    asked: the file's columns that are settings.
    """
    done = frame[frame[STATUS] == OK]
    rows: list[FileRow] = []
    lacking: Counter[str] = Counter()
    lines: Any = expected.to_dict("records")
    for one in lines:
        matching = done
        for key in asked:
            if one[key]:
                matching = matching[_equal(matching, key, one[key])]
        ours = _numbers(matching, one["figure"])
        if math.isnan(one["value"]):
            lacking["have no value"] += 1
        elif ours:
            rows.append(_row(one, ours))
        else:
            lacking[_why(one, frame, matching)] += 1
    return rows, lacking


def _table(
    expected: pd.DataFrame, asked: list[str], rows: list[FileRow], notes: tuple[str, ...]
) -> Table:
    """The rows as they are shown: settings that differ as labels, the others told below."""
    same = {key: rows[0][key] for key in asked if rows and len({row[key] for row in rows}) == 1}
    told = "; ".join(f"{key}={value}" for key, value in same.items() if value)
    labels = [key for key in ("table", "variant", *asked) if key in expected and key not in same]
    labels = [*(key for key in labels if any(row[key] for row in rows)), "figure"]
    index = pd.DataFrame([{key: row[key] for key in labels} for row in rows], columns=labels)
    text = pd.DataFrame([_text(row) for row in rows], columns=SHOWN)
    files = [*(key for key in TOLD_COLUMNS[2:] if key in expected)]
    files += list(same)
    numbers = pd.DataFrame(
        [{key: row[key] for key in (*NUMBERS, *files)} for row in rows], columns=[*NUMBERS, *files]
    )
    best = pd.DataFrame(False, index=text.index, columns=text.columns)
    return Table(
        index,
        tuple(map(Column, SHOWN)),
        text,
        best,
        numbers,
        notes,
        (f"of all: {told}",) if told else (),
    )


NUMBERS = ("value", "std", "ours", "ours (std)", "difference", "tolerance", "within")


def file_of_figures(path: Path) -> Path:
    """Where a file of published figures lies, also below experiments/; UserError where nowhere."""
    for place in (path.expanduser(), EXPERIMENTS / path):
        if place.is_file():
            return place
    raise UserError(f"{path} is not there: it is to be a CSV file of figures (table.expected)")


def _read(path: Path) -> pd.DataFrame:
    try:
        rows = pd.read_csv(file_of_figures(path), dtype=str, keep_default_na=False)
    except UserError:
        raise
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a CSV file: {error}") from error
    if missing := [key for key in ("figure", "value") if key not in rows]:
        raise UserError(
            f"{path} has no column {missing[0]!r}: expected figures have a column figure (a "
            "report's key), a column value, and a column for each setting that picks the reports"
        )
    for key in FIGURE_COLUMNS[1:]:
        column = rows.get(key, pd.Series([""] * len(rows)))
        rows[key] = pd.to_numeric(column.replace("", None), errors="coerce").astype(float)
        if wrong := [text for text, number in zip(column, rows[key], strict=True)
                     if text and math.isnan(number)]:  # fmt: skip
            raise UserError(f"{path}: {wrong[0]!r} in column {key} is no number")
    return rows


def _equal(frame: pd.DataFrame, key: str, wanted: str) -> pd.Series:
    """Which reports have that value of a setting, 3 being 3.0."""
    labels = frame[key].map(label_of) if key in frame else pd.Series("none", frame.index)
    number = pd.to_numeric(labels, errors="coerce")
    same = number == pd.to_numeric(wanted, errors="coerce")
    return (labels == wanted) | same


def _numbers(matching: pd.DataFrame, figure: str) -> list[float]:
    if figure not in matching:
        return []
    return pd.to_numeric(matching[figure], errors="coerce").dropna().astype(float).tolist()


def _row(one: FileRow, ours: list[float]) -> FileRow:
    mean, std = mean_of(ours), deviation_of(ours)
    difference = mean - one["value"]
    within = None
    if not math.isnan(one["tolerance"]):
        within = abs(difference) <= one["tolerance"] + 1e-12
    return one | {"ours": mean, "ours (std)": std, "difference": difference, "within": within}


def _text(row: FileRow) -> dict[str, str]:
    """A row's cells; a tolerance of a percentage in points, as the difference is."""
    figure = row["figure"]
    published = _spread(figure, row["value"], row["std"])
    ours = _spread(figure, row["ours"], row["ours (std)"])
    tolerance = row["tolerance"]
    size = MISSING if math.isnan(tolerance) else difference_text(figure, tolerance)
    cells = (published, ours, difference_text(figure, row["difference"]),
             size.replace("+", "±"), WITHIN[row["within"]])  # fmt: skip
    return dict(zip(SHOWN, cells, strict=True))


def _spread(figure: str, value: float, std: float) -> str:
    shown = figure_text(figure, value)
    return f"{shown} ± {figure_text(figure, std)}" if std > 0 else shown


def _why(one: FileRow, frame: pd.DataFrame, matching: pd.DataFrame) -> str:
    """Why an expected figure has none of ours beside it."""
    if "/" not in one["figure"]:
        return "are no figures of reports"
    model = one.get("model", "")
    if model and model not in set(frame["model"]):
        return f"are of {model}, which was not run"
    return "were not run" if matching.empty else "were not evaluated or measured"


def _notes(rows: list[FileRow], lacking: Counter[str], path: Path) -> Iterator[str]:
    judged = [row["within"] for row in rows if row["within"] is not None]
    yield (
        f"{len(rows)} figures of {path.name} beside ours: {sum(judged)} of the {len(judged)} with "
        "a stated tolerance are within it"
    )
    for reason, number in lacking.items():
        yield f"further rows, {number}, {reason}"
