"""Sweeps and a store on disk, made up as runs leave them, and the command."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from made_up_runs import Command, Process, Stored, start, tell, write_sweep

from moe_lab.runs.__main__ import main


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def sweep(place: Path) -> Iterator[Path]:
    """Jobs 0 to 10: ok, failed, killed, running, killed before it reported, 5 to 9 missing, ok."""
    folder = place / "runs" / "sweep"
    overrides = [["model=tiny", f"ratio={number}"] for number in range(11)]
    write_sweep(folder, overrides)
    stages = {"seconds__profile": 100.0, "cached__profile": True, "seconds__plan": 3.0,
              "cached__plan": False}  # fmt: skip
    for number, status in enumerate(["ok", "failed", "running", "running"]):
        start(folder / str(number), overrides[number], place)
        tell(folder / str(number), status, **stages)
    start(folder / "4", overrides[4], place)
    start(folder / "10", overrides[10], place)
    tell(folder / "10", "ok", **stages, seconds__total=125.0)
    tell(folder / "1", "failed", **stages | {"error": "too\nmany", "seconds__total": 7.0})
    (folder / "3" / "run.log").write_text("10:00 profile\n10:01 evaluate:  1 of 2\n\n")
    (folder / "2" / "job.lock").touch()
    with FileLock(folder / "3" / "job.lock"):
        yield folder


@pytest.fixture
def stored(place: Path) -> Stored:
    return Stored(place)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """The command in this process: its code, what it printed, and its complaints."""

    def call(*words: Any) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        return (code, *capsys.readouterr())

    return call


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> type[Process]:
    Process.asked, Process.codes = [], []
    monkeypatch.setattr(subprocess, "Popen", Process)
    return Process
