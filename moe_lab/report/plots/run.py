"""Pictures of one run, from what its folder holds: what is not there is not drawn.

`draw_run` returns the PNGs that it wrote, each with a PDF of the same name beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from moe_lab.files import CURVE, PLAN, PLOTS, REPORT, USAGE
from moe_lab.models.edits.plan import Plan
from moe_lab.report.plots import curve, plan, style
from moe_lab.report.report import read_report

# Of a report: names in the pictures.
TOLD_IN_PICTURES = ("metric", "condense/layers", "condense/experts")


def draw_run(folder: Path) -> list[Path]:
    """Draw into <folder>/plots what the files of one run tell, each of which may be missing.

    usage.csv (layer, expert, tokens, usage): usage; plan.json: scores, kept, divergence;
    curve.jsonl: curves. report.json names the metric and the ways to choose.
    """
    report = read_report(folder) if (folder / REPORT).is_file() else {}
    return draw_run_into(folder, told_of(report), folder / PLOTS)


def told_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """What pictures take from a run's report."""
    return {key: report[key] for key in TOLD_IN_PICTURES if key in report}


def shown_files(folder: Path) -> list[Path]:
    """The files of a run that pictures show, those that are there."""
    return [folder / name for name in (USAGE, PLAN, CURVE) if (folder / name).is_file()]


def draw_run_into(folder: Path, told: Mapping[str, Any], home: Path) -> list[Path]:
    """Draw the `shown_files` of a run's folder into the folder `home`; told: as of `told_of`."""
    written: list[Path | None] = []
    sizes: dict[int, int] = {}
    if (folder / USAGE).is_file():
        usage = pd.read_csv(folder / USAGE)
        most = usage.groupby("layer")["expert"].max() + 1
        sizes = dict(zip(most.index.tolist(), most.tolist(), strict=True))
        style.draw_by_expert(usage.assign(unused=usage["tokens"] == 0), "usage", home / "usage.png",
                        "Usage of the experts (unused ones ringed)",
                        "share of routed slots × experts (1 = even)", marked="unused")  # fmt: skip
        written.append(home / "usage.png")
    if (folder / PLAN).is_file():
        written += plan.draw_plan(Plan.load(folder / PLAN), sizes, told, home)
    if (folder / CURVE).is_file():
        written.append(curve.draw_curve(curve.read_curve(folder / CURVE), home / "curves.png"))
    return [path for path in written if path]
