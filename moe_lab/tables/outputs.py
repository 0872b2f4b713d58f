"""What a sweep leaves in its folder at its end.

The table in all formats, the comparison with published figures, pictures and a page.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from moe_lab.report.frame import read_reports
from moe_lab.report.page.page import write_page
from moe_lab.report.plots.kept import sweep_pictures
from moe_lab.report.plots.sweep import draw_sweep
from moe_lab.tables.comparison import compare_to_baseline
from moe_lab.tables.expected import compare_to_published
from moe_lab.tables.pivot import Request, filtered, pivot, possible
from moe_lab.tables.table import Table, lay_out
from moe_lab.types import UserError

logger = logging.getLogger(__name__)
ENDINGS = {".md": "markdown", ".csv": "csv", ".tex": "latex"}


def make_table(frame: pd.DataFrame, request: Request) -> Table:
    """The table of reports that a request asks for; UserError where they do not have it."""
    made = pivot(frame, request)
    compared = [compare_to_baseline(made, baseline) for baseline in request.baseline or ()]
    return lay_out(made, compared, request.best)


def make_comparison(frame: pd.DataFrame, request: Request) -> Table:
    """Published figures beside those of the reports."""
    return compare_to_published(filtered(frame, request.filters), Path(request.expected or ""))


def write_outputs(
    folder: Path, request: Request, store: Path | None = None
) -> tuple[list[Path], list[Table]]:
    """Everything of a sweep into its folder: tables, comparison, pictures, page.

    The files' paths, and the tables to be shown, of the comparison what is not within tolerance.
    store: where pictures are kept; without one they are drawn.
    What cannot be made (a file that is no comparison, a disk that is full) is told, and costs
    nothing of the rest.
    """
    frame = read_reports(folder)
    request = possible(frame, request)
    shown: list[Table] = []

    def files(name: str, made: Callable[[pd.DataFrame, Request], Table]) -> list[Path]:
        shown.append(made(frame, request))
        return _files(folder / name, shown[-1])

    written = _guarded("table", lambda: files("table", make_table))
    if request.expected:
        written += _guarded("comparison", lambda: files("expected", make_comparison))

    def pictures() -> list[Path]:
        return sweep_pictures(folder, frame, store) if store else draw_sweep(folder, frame)

    written += _guarded("pictures", pictures)
    written += _guarded("page", lambda: [write_page(folder)])
    return written, [one.only(~_within(one)) for one in shown]


def _within(table: Table) -> pd.Series:
    """Which rows of a comparison are within tolerance; none of another table."""
    if "within" not in table.numbers:
        return pd.Series(False, index=table.index.index)
    return table.numbers["within"].eq(True)


def _guarded(what: str, act: Callable[[], list[Path]]) -> list[Path]:
    try:
        return act()
    except UserError as error:
        logger.warning("no %s: %s", what, error)
    except Exception:  # one part of ours that fails is to cost no other, nor the sweep
        logger.exception("no %s", what)
    return []


def _files(path: Path, table: Table) -> list[Path]:
    """A table in all formats, at `path` with their endings."""
    written = [path.with_suffix(ending) for ending in ENDINGS]
    for file in written:
        file.write_text(getattr(table, ENDINGS[file.suffix])(), encoding="utf-8")
    return written
