"""A run's result: one flat JSON object, and the tables made from it.

The keys are the contract: `<variant>/<figure>` for dense, compressed, finetuned and quantized, and
`seconds/<stage>`, `cached/<stage>` for the stages, and `seconds/<part>` for what is around them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_lab.files import REPORT
from moe_lab.integrity import write_whole
from moe_lab.report.figures import finite
from moe_lab.types import UserError

OK = "ok"  # the status of a job that went well
AROUND_STAGES = ("start", "text", "pictures", "total")  # of a job's time, which are no stages
Report = dict[str, str | int | float | bool | None]


def write_report(folder: Path, report: Mapping[str, Any]) -> Path:
    """Write report.json into the run's folder, keys in the order given, and return its path.

    NaN and infinities become null. Raises TypeError for a value that is not flat.
    """
    for key, value in report.items():
        if value is not None and not isinstance(value, (str, int, float)):
            raise TypeError(f"report[{key!r}] is a {type(value).__name__}, not text or a number")
    path = folder / REPORT
    plain = {key: finite(value) for key, value in report.items()}
    write_whole(path, json.dumps(plain, indent=2, ensure_ascii=False) + "\n")
    return path


def read_report(folder: Path) -> Report:
    """The report that `write` put into a run's folder; UserError for a file that is none."""
    path = folder / REPORT
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(report, dict) or "status" not in report:
        raise UserError(f"{path} cannot be read: it is no report, which has a status")
    return report


def job_order(folder: Path) -> list[tuple[int, str]]:
    """Sorts the folders of jobs: 10 after 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in folder.parts]
