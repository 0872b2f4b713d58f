"""How a dry run is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_lab.files import DRY_RUN
from moe_lab.runs import rehearsal
from moe_lab.runs.status import REHEARSED, find_jobs


def figures(plan: str, cached: bool | None = False, **others: Any) -> dict[str, Any]:
    """Of a job with a profile that all share, and a plan of its own."""
    told: dict[str, Any] = {"model": "tiny", "refused": None}
    for stage, work in (("profile", "same"), ("compress", plan)):
        told |= {
            f"{stage}/memory_gib": 2.0, f"{stage}/disk_gib": 3.0, f"{stage}/scratch_gib": 0.5,
            f"{stage}/read_gib": 1.0, f"{stage}/flops": 1e12, f"{stage}/hours": 0.25,
            f"{stage}/cached": cached, f"{stage}/work": work,
        }  # fmt: skip
    return told | {
        "memory_gib": 2.7, "process_gib": 0.7, "disk_gib": 6.5, "read_gib": 2.0, "flops": 2e12,
        "hours": 0.5, "card": "h100", "dense/gib": 10.0, "result/gib": 7.5, "result/exact": True,
        "result/form": "in the family's own form", "assumed": ["text is not read"],
    } | others  # fmt: skip


def test_a_row_for_each_stage_and_one_for_all() -> None:
    rows = rehearsal.table_rows(figures("a", cached=None))
    assert [row[0] for row in rows] == ["profile", "compress", "in all"]
    assert rows[0] == ("profile", "2.00", "3.00 (+0.50)", "1.00", "1 T", "15 min 0 s", "unknown")
    assert rows[-1][1:3] == ("2.70", "6.50")


def test_what_stands_below() -> None:
    told = rehearsal.remarks_of(figures("a"))
    assert told[1] == "the result: 7.5 GiB of 10, saved in the family's own form"
    assert told[2] == "text is not read"
    assert "about 7.5 GiB" in rehearsal.remarks_of(figures("a") | {"result/exact": False})[1]


def test_a_sweep_counts_once_what_its_jobs_share() -> None:
    told = rehearsal.sweep_line([figures("a"), figures("b"), figures("b")])
    assert told == (
        "3 jobs in all: 2.70 GiB of memory for the largest, 9.50 of disk, 3 TFLOP, 45 min 0 s "
        "one after the other; 3 of 6 results are shared"
    )
    there = rehearsal.sweep_line([figures("a", cached=True), {"refused": "no", "model": "x"}])
    assert there.startswith("2 jobs in all") and there.endswith("; 1 refused")
    assert ", 0.00 of disk," in there


def test_a_job_of_a_sweep_is_a_line() -> None:
    assert rehearsal.line_of(figures("a")) == (
        "2.70 GiB of memory, 6.50 of disk, 2 TFLOP, 30 min 0 s on h100, result 7.5 GiB"
    )
    assert rehearsal.line_of({"refused": "why", "model": "x"}) == "refused"


def test_its_job_is_neither_done_nor_killed(tmp_path: Path) -> None:
    job = tmp_path / "run" / "0"
    (job / ".hydra").mkdir(parents=True)
    (job / DRY_RUN).write_text("{}")
    [found] = find_jobs(tmp_path / "run")
    assert found.status == REHEARSED
    assert rehearsal.read(job) == {} and rehearsal.read(tmp_path) is None
