"""Many reports as one frame, and which of their keys are settings, results or origin.

The one place that says what a report's key is; tables, pictures and pages are made from it.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from moe_lab.files import REPORT, REPRODUCED
from moe_lab.report.figures import VARIANTS
from moe_lab.report.report import OK, job_order, read_report
from moe_lab.types import UserError

REQUEST = "fingerprint/request"  # of everything that was asked for and decides a result
STATUS, NONE = "status", "none"
# Not settings: what a job gave, and what names it. The rest of a report's keys is its settings.
RESULT_KEYS = re.compile(
    r"(status|error|sweep|job|run_id|url|fingerprint/request)$|"
    rf"(({'|'.join(VARIANTS)})(_top_\d+)?|seconds|cached|artifact|plan|diagnosis)/"
)
ORIGIN_KEYS = re.compile(
    r"(commit|hardware)$|(fingerprint|versions)/"
)  # told below a table, not made rows by themselves
SEED_KEYS = re.compile(r"(^|/)seed$")


def report_folders(folder: Path) -> list[Path]:
    """The folders with a report at or below `folder`, in the order of the jobs: 10 after 9.

    Not those of runs that were only made again to be compared.
    """
    found = (path.parent for path in folder.rglob(REPORT))
    return sorted((one for one in found if one.name != REPRODUCED), key=job_order)


def read_reports(folder: Path) -> pd.DataFrame:
    """All reports under a folder, one a row in the order of the jobs; UserError if there are none.

    The index is each run's folder relative to `folder` ("3", "." for itself). What a report lacks
    is None.
    """
    folders = report_folders(folder)
    if not folders:
        raise UserError(f"{folder} holds no {REPORT}: name a folder of runs, or one run's")
    reports = [read_report(one) for one in folders]
    keys = dict.fromkeys(key for one in reports for key in one)
    index = [one.relative_to(folder).as_posix() for one in folders]
    columns = {key: [one.get(key) for one in reports] for key in keys}
    return pd.DataFrame(columns, index=index, dtype=object)


def keys_of(frame: pd.DataFrame) -> list[str]:
    """The keys of a frame's columns."""
    return list(map(str, frame))


def setting_keys(frame: pd.DataFrame) -> list[str]:
    """The keys that say what was asked for."""
    return [key for key in keys_of(frame) if not RESULT_KEYS.match(key)]


def varying_keys(frame: pd.DataFrame) -> list[str]:
    """The settings that differ between reports."""
    return [key for key in setting_keys(frame) if differs(frame[key])]


def free_keys(frame: pd.DataFrame) -> list[str]:
    """The settings that tell the jobs of a sweep apart, seeds and origin aside.

    Where they do not (one that some jobs have not at all; an option that reports do not tell), what
    is needed besides: settings that some lack, and in the end the name of the job.
    """
    names = [
        key
        for key in setting_keys(frame)
        if not SEED_KEYS.search(key) and not ORIGIN_KEYS.match(key)
    ]
    keys = [key for key in names if differs(frame[key])]
    lacking = [key for key in names if key not in keys and frame[key].isna().any()]
    lacking = [key for key in lacking if frame[key].notna().any()]
    while mixed := _mixed(frame, keys):
        parts = [frame.loc[names] for names in mixed]
        lacked = (key for key in lacking if any(part[key].isna().nunique() > 1 for part in parts))
        key = next(lacked, "job")
        if key in keys or key not in frame:
            break
        keys.append(key)
    return keys


def _mixed(frame: pd.DataFrame, keys: Sequence[str]) -> list[list[str]]:
    """Reports, by their index, alike in `keys` and all seeds, that were asked for other things."""
    if REQUEST not in frame:
        return []
    seeds = [
        key for key in setting_keys(frame) if SEED_KEYS.search(key) and frame[key].notna().any()
    ]
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, line in zip(
        frame.index, frame[[*keys, *seeds]].map(label_of).to_numpy(), strict=True
    ):
        groups.setdefault(tuple(line), []).append(name)
    asked = frame[REQUEST].to_dict()
    return [names for names in groups.values() if len({asked[one] for one in names} - {None}) > 1]


def distinct_reports(frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The reports without repetitions of the same job, and which were left out.

    What was asked for more than once, in several folders, is one result and no further seed: the
    last one that went well stays.
    """
    if REQUEST not in frame:
        return frame, []
    asked = frame[REQUEST].map(label_of) + frame["model"].map(label_of)
    known = frame[REQUEST].notna()
    last = frame.assign(asked=asked, ok=frame[STATUS] == OK)[known]
    last = last.sort_values("ok", kind="stable").drop_duplicates("asked", keep="last")
    kept = ~known | frame.index.isin(last.index)
    return frame[kept], list(frame.index[~kept])


def differs(column: pd.Series) -> bool:
    """Whether a setting has several values; to have none (another method's setting) is none."""
    return column.dropna().map(str).nunique() > 1


def mean_of(figures: Sequence[float]) -> float:
    """The mean of some figures, exactly theirs where all are equal; NaN of none."""
    if not figures:
        return math.nan
    return figures[0] if min(figures) == max(figures) else statistics.fmean(figures)


def deviation_of(figures: Sequence[float]) -> float:
    """The sample standard deviation (n - 1); NaN of fewer than two figures."""
    return statistics.stdev(figures) if len(figures) > 1 else math.nan


def label_of(value: object) -> str:
    """A setting's value as text, in one line."""
    return NONE if value is None or value != value else " ".join(str(value).split())


def labels_of(values: Iterable[object]) -> str:
    """Different values as text, each once: a,b."""
    return ",".join(dict.fromkeys(map(label_of, values)))


def reason_of(one: Any) -> str:
    """Why a report has no result: its error in one line, or that it did not come to an end."""
    if one.get("error"):
        return " ".join(str(one["error"]).split())
    return "it has not ended: still running, or killed"
