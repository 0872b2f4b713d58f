"""One job: left out when done, refused when in use, its report as it goes."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from running import Outcome

from moe_lab.files import LOCK
from moe_lab.report.report import read_report
from moe_lab.stages import pipeline


def test_a_finished_job_is_left_out_only_where_the_same_is_asked(
    job: Callable[..., Outcome], tmp_path: Path
) -> None:
    folder = tmp_path / "job"

    def asked(*overrides: str) -> bool:
        """Whether the job was run, with the report of the run before in its place."""
        before = (folder / "report.json").stat().st_mtime_ns
        outcome = job(*overrides, anew=False)
        assert outcome.code == 0, outcome.text
        return (folder / "report.json").stat().st_mtime_ns != before

    assert job("ratio.ratio=0.25").code == 0
    first = read_report(folder)
    assert not asked("ratio.ratio=0.25", "resume=true")
    assert not asked("ratio.ratio=0.25", "resume=true", "compute.batch_size=3"), "no other result"
    assert asked("ratio.ratio=0.25"), "resume=true was not said"
    assert read_report(folder)["run_id"] == first["run_id"], "the tracker's run goes on"
    assert asked("ratio.ratio=0.5", "resume=true"), "something else was asked for"
    assert read_report(folder)["run_id"] != first["run_id"]


def test_a_folder_in_use_is_refused(job: Callable[..., Outcome], tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "job" / LOCK)
    with lock:
        outcome = job()
    assert outcome.code == 2
    assert "is being written by another run: choose another run_dir" in outcome.text
    assert outcome.report == {}
    assert job().code == 0
    assert not (tmp_path / "job" / LOCK).exists()


def test_what_another_request_left_in_the_folder_is_not_taken_for_ours(
    job: Callable[..., Outcome], tmp_path: Path
) -> None:
    (tmp_path / "job" / "curve.jsonl").write_text('{"phase": "lm", "step": 1, "loss": 2.0}\n')
    assert job().code == 0
    assert not (tmp_path / "job" / "curve.jsonl").exists()
    assert not (tmp_path / "job" / "plots" / "curves.png").exists()


def test_stages_are_told_as_they_end(
    job: Callable[..., Outcome], main_module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A report that is read while the plan is made has the profile, and where it lies."""
    seen = {}
    from moe_lab.stages import plan

    def look(*arguments: Any) -> Any:
        seen.update(json.loads((tmp_path / "job" / "report.json").read_text()))
        return plan.plan(*arguments)

    monkeypatch.setattr(plan, "STAGE", replace(plan.STAGE, make=look))
    outcome = job()
    assert seen["status"] == "running" and "seconds/plan" not in seen
    assert (outcome.store / seen["artifact/profile"] / "artifact.json").is_file()
    assert outcome.report["artifact/plan"].startswith("plan/")
    took = [key.partition("/")[2] for key in outcome.report if key.startswith("seconds/")]
    assert took[:3] == ["start", "text", "profile"] and took[-2:] == ["pictures", "total"]
    parts = [outcome.report[f"seconds/{name}"] for name in ("start", "text", "pictures")]
    assert min(parts) > 0 and sum(parts) < outcome.report["seconds/total"]


def test_a_failure_of_ours_is_reported_with_its_traceback(
    job: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(pipeline, "pipeline", broken)
    outcome = job()
    outcome_error = (outcome.report["status"], outcome.report["error"])
    assert outcome_error == ("failed", "ZeroDivisionError: ours")
    assert outcome.code == 1 and "Traceback" in outcome.text


def test_a_folder_that_finds_no_room_is_told_in_a_line(
    job: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As shutil says it of a copied folder: a list, and no errno."""

    def full(*_: Any) -> None:
        why = f"[Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}: '/a' -> '/b/a'"
        raise shutil.Error([("/a", "/b/a", why)])

    monkeypatch.setattr(pipeline, "pipeline", full)
    outcome = job()
    assert outcome.code == 2 and "Traceback" not in outcome.text
    assert outcome.report["error"] == "/b/a cannot be written: No space left on device"


def test_a_stopped_run_writes_its_report(
    job: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "pipeline", stopped)
    with pytest.raises(KeyboardInterrupt):
        job()
    report = json.loads((tmp_path / "job" / "report.json").read_text())
    assert (report["status"], report["error"]) == ("failed", "stopped by Ctrl-C")
