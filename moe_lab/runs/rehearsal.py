"""Dry runs around the pipeline: what a job would cost, as a table, a line and dry_run.json."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table

from moe_lab.console import terminal
from moe_lab.files import DRY_RUN
from moe_lab.progress import duration
from moe_lab.runs.refusals import USER_MISTAKE
from moe_lab.runs.settings import Description
from moe_lab.types import UserError

logger = logging.getLogger(__name__)
Figures = Mapping[str, Any]
TABLE_HEAD = ("stage", "memory", "disk", "reads", "flops", "time", "stored")
YES, NO, UNKNOWN = "yes", "no", "unknown"


def rehearse(job: Description, foresee: Callable[[], dict[str, Any]]) -> int:
    """Foresee a job, tell it and write dry_run.json; 2 where it is refused, else 0.

    No report is written: a dry run is no finished run, and leaves that of an earlier one alone.
    """
    logging.captureWarnings(True)
    file = job.folder / DRY_RUN
    file.unlink(missing_ok=True)
    try:
        figures = foresee()
    except UserError as error:
        figures = {"model": job.config["model"]["name"], "refused": str(error)}
    file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if job.place:
        logger.info("%s: %s", job.place, line_of(figures))
    elif "hours" in figures:
        _show(figures, file)
    if figures["refused"]:
        logger.error("%s", figures["refused"])
        return USER_MISTAKE
    return 0


def stages_of(figures: Figures) -> list[str]:
    """The stages of a dry run, in order."""
    end = "/memory_gib"
    return [key.removesuffix(end) for key in figures if key.endswith(end)]


def table_rows(figures: Figures) -> list[tuple[str, ...]]:
    """The table's rows: of each stage, and of what is left to do."""
    rows = []
    for stage in stages_of(figures):
        there = {True: YES, False: NO, None: UNKNOWN}[figures[f"{stage}/cached"]]
        scratch = figures[f"{stage}/scratch_gib"]
        besides = f" (+{_gib(scratch)})" if scratch > 0.005 else ""
        rows.append((stage, *_cells(figures, f"{stage}/", besides), there))
    total = ("in all", *_cells(figures, ""), "")
    return [*rows, total]


def _cells(figures: Figures, prefix: str, besides: str = "") -> tuple[str, ...]:
    memory, disk, reads = (
        _gib(figures[f"{prefix}{one}_gib"]) for one in ("memory", "disk", "read")
    )
    flops, hours = figures[f"{prefix}flops"], figures[f"{prefix}hours"]
    return memory, disk + besides, reads, _flops(flops) if flops else "–", _time(hours)


def remarks_of(figures: Figures) -> list[str]:
    """What stands below the table, a line each."""
    told = [f"GiB, and time on {figures['card']}; memory in all: of the largest stage, and "
            f"{_gib(figures['process_gib'])} GiB of the process itself"]  # fmt: skip
    if "result/gib" in figures:
        about = "" if figures["result/exact"] else "about "
        size = f"{about}{figures['result/gib']:.3g} GiB of {figures['dense/gib']:.3g}"
        form = f", saved {figures['result/form']}" if "result/form" in figures else ""
        told.append(f"the result: {size}{form}")
    return [*told, *figures["assumed"]]


def line_of(figures: Figures) -> str:
    """A job of a sweep in a line."""
    if "hours" not in figures:
        return "refused"
    size = f", result {figures['result/gib']:.3g} GiB" if "result/gib" in figures else ""
    return (
        f"{_gib(figures['memory_gib'])} GiB of memory, {_gib(figures['disk_gib'])} of disk, "
        f"{_flops(figures['flops'])}FLOP, {_time(figures['hours'])} on "
        f"{figures['card']}{size}"
    )


def sweep_line(jobs: Iterable[Figures]) -> str:
    """All jobs of a sweep in a line: what they share is counted once, what is there not at all."""
    jobs = list(jobs)
    known = [one for one in jobs if "hours" in one]
    work: dict[str, dict[str, float]] = {}
    shared = 0
    for one in known:
        for stage in (stage for stage in stages_of(one) if not one[f"{stage}/cached"]):
            key = one[f"{stage}/work"]
            shared += key in work
            names = ("disk_gib", "scratch_gib", "read_gib", "flops", "hours")
            work[key] = {name: one[f"{stage}/{name}"] for name in names}
    total = {name: sum(one[name] for one in work.values()) for name in ("flops", "hours")}
    disk = sum(one["disk_gib"] for one in work.values())
    disk += max((one["scratch_gib"] for one in work.values()), default=0.0)
    memory = max((one["memory_gib"] for one in known), default=0.0)
    refused = sum(bool(one["refused"]) for one in jobs)
    told = (
        f"{len(jobs)} jobs in all: {_gib(memory)} GiB of memory for the largest, {_gib(disk)} of "
        f"disk, {_flops(total['flops'])}FLOP, {_time(total['hours'])} one after the "
        f"other; {shared} of {shared + len(work)} results are shared"
    )
    return told + (f"; {refused} refused" if refused else "")


def read(folder: Path) -> dict[str, Any] | None:
    """What a job's folder has of a dry run; None where it has none."""
    file = folder / DRY_RUN
    if not file.is_file():
        return None
    figures: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return figures


def _show(figures: Figures, file: Path) -> None:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)  # 80 columns hold it
    for place, name in enumerate(TABLE_HEAD):
        side: Literal["left", "right"] = "left" if place in (0, len(TABLE_HEAD) - 1) else "right"
        table.add_column(name, justify=side, no_wrap=True)
    *body, total = table_rows(figures)
    for row in body:
        table.add_row(*row)
    table.add_section()
    table.add_row(*total)
    console = terminal()
    console.print(table)
    for remark in remarks_of(figures):
        console.print(remark, soft_wrap=True)
    console.print(f"{'dry run':>10}: {file}", soft_wrap=True)


def _gib(size: float) -> str:
    return f"{size:.2f}" if size < 100 else f"{size:,.0f}"


def _flops(number: float) -> str:
    """In units of 1e12."""
    return f"{number / 1e12:,.3g} T"


def _time(hours: float) -> str:
    """In words; the shortest times are not worth a figure."""
    return duration(hours * 3600) if hours * 3600 >= 1 else "< 1 s"
