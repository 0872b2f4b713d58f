"""`python -m moe_lab.runs`: complaints, options, Ctrl-C."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from made_up_runs import Command, Process, start, tell, write_sweep

from moe_lab.runs.__main__ import main


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gone", "gone is no folder"),
        ("empty", "empty has no runs: no report.json, .hydra or sweep.json"),
        ("half", "sweep.json cannot be read: KeyError('overrides')"),
    ],
)
def test_complaints(place: Path, command: Command, name: str, words: str) -> None:
    for made in ("empty", "half/0"):
        (place / made).mkdir(parents=True)
    (place / "half" / "sweep.json").write_text('{"argv": []}')
    code, text, complaints = command(place / name)
    assert (code, text) == (2, "")
    assert words in complaints


def test_torn_report_is_that_of_a_killed_job(place: Path, command: Command) -> None:
    for name in ("torn", "whole"):
        start(place / "runs" / name, ["model=tiny"], place)
    tell(place / "runs" / "whole", "ok")
    (place / "runs" / "torn" / "report.json").write_text('{"status": "o')
    code, text, _ = command("runs")
    assert code == 0 and "1 ok, 1 killed" in text and "report.json cannot be read" in text


def test_torn_record_of_hydra_is_named(place: Path, command: Command) -> None:
    start(place / "one", ["model=tiny"], place)
    tell(place / "one", "failed")
    (place / "one" / ".hydra" / "overrides.yaml").write_text("- [a\n- }")
    code, _, complaints = command("one")
    assert code == 2 and "overrides.yaml cannot be read" in complaints


def test_from_a_shell(sweep: Path) -> None:
    command = [sys.executable, "-m", "moe_lab.runs", str(sweep), "--status", "ok"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1].startswith("0    ok")


def test_ctrl_c_waits_for_the_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sweep(place / "s", [["a=0"]])
    answers: list[Any] = [KeyboardInterrupt(), 130]

    class Slow(Process):
        asked: list = []  # noqa: RUF012

        def wait(self) -> int:
            answer = answers.pop(0)
            if isinstance(answer, BaseException):
                raise answer
            return answer

    monkeypatch.setattr(subprocess, "Popen", Slow)
    assert main([str(place / "s"), "--rerun"]) == 130
    assert not answers


@pytest.mark.parametrize(
    "words",
    [["--yes"], ["--rerun", "--clean"], ["--rerun", "--json"], ["--clean", "--status", "ok"]],
)
def test_options_that_do_not_go_together(sweep: Path, words: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(sweep), *words])
    assert stopped.value.code == 2
