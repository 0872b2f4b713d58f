"""Jobs, stores and what cleaning frees as lines of text, for terminals and for pipes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from moe_lab.console import terminal
from moe_lab.progress import duration
from moe_lab.report.figures import MISSING, figure_text
from moe_lab.report.report import OK
from moe_lab.runs.status import FAILED, KILLED, NOT_STARTED, RUNNING, STATUSES, Job, settings_apart

JOB_HEAD = ["job", "status", "stage", "time", "cached", "settings"]
STORE_HEAD = ["kind", "results", "used here", "unfinished", "size", "took"]
NO_LIMIT = 10_000  # columns of a line that is cut later, or never
STYLES = {OK: "green", FAILED: "red", KILLED: "red", RUNNING: "yellow", NOT_STARTED: "dim"}


def describe(jobs: list[Job], folder: Path) -> list[dict[str, Any]]:
    """Each job's line as values; settings: what differs from the other jobs of its sweep."""
    labels, root = settings_apart(jobs), folder.resolve()
    return [
        {
            "job": job.folder.relative_to(root).as_posix(),
            "status": job.status,
            "stage": job.stages[-1] if job.stages else None,
            "seconds": job.elapsed,
            "cached": job.num_cached,
            "stages": len(job.stages),
            "settings": labels[job.folder],
            "note": job.note,
        }
        for job in jobs
    ]


def totals(jobs: list[Job]) -> dict[str, Any]:
    """How many jobs there are and in which state; seconds that they computed and were saved."""
    states = [job.status for job in jobs]
    counts = {status: states.count(status) for status in dict.fromkeys([*STATUSES, *states])}
    return {
        "jobs": len(jobs),
        "statuses": {status: number for status, number in counts.items() if number},
        "computed": sum(job.seconds(cached=False) for job in jobs),
        "saved": sum(job.seconds(cached=True) for job in jobs),
    }


def summed_up(jobs: list[Job]) -> str:
    """The summary in one line."""
    said = totals(jobs)
    states = ", ".join(f"{number} {status}" for status, number in said["statuses"].items())
    return (
        f"{many(len(jobs), 'job')}: {states}; {duration(said['computed'])} computed, "
        f"{duration(said['saved'])} saved by the store (cached stages)"
    )


def show_jobs(described: Sequence[Mapping[str, Any]]) -> None:
    """Print a line per job; on a terminal cut to its width, with the jobs' folders as headings."""
    rows, notes = [_cells(one) for one in described], [one["note"] for one in described]
    console = terminal()
    if not console.is_terminal:
        for line, note in zip(aligned([JOB_HEAD, *rows]), ["", *notes], strict=True):
            print(f"{line}  {note}" if note else line)
        return
    homes = [row[0].rpartition("/")[0] for row in rows]
    for row in rows:
        row[0] = row[0].rpartition("/")[2]
    head, *lines = aligned([JOB_HEAD, *rows])
    start, before = head.index(JOB_HEAD[1]), ""
    _print_cut(console, Text(head, "bold"))
    for row, line, note, home in zip(rows, lines, notes, homes, strict=True):
        style = STYLES.get(row[1], "")
        if home != before:
            _print_cut(console, Text(home, "bold"))
        before, text = home, Text(line)
        text.stylize(style, start, start + len(row[1]))
        _print_cut(console, text)
        if note:
            _print_cut(console, Text(" " * start + note, style))


def show_store(root: Path, kinds: Mapping[str, Mapping[str, float]], others: Mapping[str, int],
               free: Iterable[Mapping[str, Any]]) -> None:  # fmt: skip
    """Print what a store holds by kind, what else lies there, and what cleaning would free."""
    print(f"\nstore: {root}")
    rows = [
        [
            kind,
            *(str(one[key]) for key in ("results", "used", "unfinished")),
            size(one["bytes"]),
            took(one["seconds"]),
        ]
        for kind, one in kinds.items()
    ]
    for line in aligned([STORE_HEAD, *rows], right=True):
        print(line)
    if others:
        names = (f"{name} ({size(number)})" for name, number in others.items())
        print(f"also there, and never touched: {', '.join(names)}")
    for one in free:
        if one["refused"]:
            print(f"--clean {one['what']}: not now: {one['refused']}")
        elif one["results"]:
            made = f"{many(one['results'], 'result')} that took {took(one['seconds'])} to make"
            print(f"--clean {one['what']} would free {size(one['bytes'])}: {made}")


def aligned(rows: list[list[str]], right: bool = False) -> list[str]:
    """Rows as lines with columns below each other; right: all but the first to the right.

    As lines, not as one table: headings and notes go between them.
    """
    if not rows:
        return []
    made = Table.grid(padding=(0, 2, 0, 0))
    for number in range(len(rows[0])):
        made.add_column(justify="right" if right and number else "left", no_wrap=True)
    for row in rows:
        made.add_row(*map(Text, row))
    console = terminal(width=NO_LIMIT)
    lines = console.render_lines(made, pad=False)
    return ["".join(part.text for part in line).rstrip() for line in lines]


def took(seconds: float | None) -> str:
    """A time for people: 21.3 s, 12 min 3 s, 3 h 2 min."""
    return MISSING if seconds is None else duration(seconds)


def size(number: float) -> str:
    """Bytes as reports say them: 1.3 MB."""
    return figure_text("bytes", number)


def many(number: int, what: str) -> str:
    """1 job, 2 jobs."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _cells(one: Mapping[str, Any]) -> list[str]:
    cached = f"{one['cached']} of {one['stages']}" if one["stages"] else MISSING
    stage = one["stage"] or MISSING
    return [one["job"], one["status"], stage, took(one["seconds"]), cached, one["settings"]]


def _print_cut(console: Any, line: Text) -> None:
    line.truncate(console.width, overflow="ellipsis")
    console.print(line, soft_wrap=True)
