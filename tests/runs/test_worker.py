"""Jobs in a launcher's processes: their signals, what they give to a sweeper, who still runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import ROOT

from moe_lab import stopping
from moe_lab.files import LOCK
from moe_lab.locks import locked
from moe_lab.report.report import write_report
from moe_lab.runs import worker
from moe_lab.types import UserError

JOB = """
import pathlib, sys, time
from moe_lab import locks, stopping
stopping.install()
try:
    with locks.locked(pathlib.Path(sys.argv[1]), "it"):
        print("held", flush=True)
        time.sleep(60)
except KeyboardInterrupt as stop:
    print(stopping.name_of(stop), flush=True)
"""


@pytest.fixture(autouse=True)
def outside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process that a launcher has just started: nobody has taken the signals."""
    before = {one: signal.getsignal(one) for one in stopping.SIGNALS}
    hook = sys.unraisablehook
    monkeypatch.setattr(stopping, "_state", stopping._State())
    monkeypatch.setattr(worker, "_state", worker._State())
    monkeypatch.delenv("SUBMITIT_EXECUTOR", raising=False)
    yield
    sys.unraisablehook = hook
    for one, handler in before.items():
        signal.signal(one, handler)


def job_in(folder: Path) -> subprocess.Popen[str]:
    folder.mkdir(parents=True)
    process = subprocess.Popen(
        [sys.executable, "-c", JOB, str(folder / LOCK)], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout and process.stdout.readline() == "held\n"
    return process


def test_submitit_queues_again_what_its_warning_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    queued = []
    signal.signal(signal.SIGUSR2, lambda number, frame: queued.append(number))
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    worker.enter()
    with worker.stopped_alone() as offered:
        os.kill(os.getpid(), signal.SIGUSR2)
        time.sleep(1)
        offered.objectives = (1.0,)
    assert queued == [signal.SIGUSR2] and offered.objectives is None


def test_another_signal_does_not_queue_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As scancel's; nor does the launcher hear of it, which would end the other jobs."""
    queued = []
    signal.signal(signal.SIGUSR2, lambda number, frame: queued.append(number))
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    worker.enter()
    with worker.stopped_alone():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert queued == [] and stopping.asked()


def test_in_run_py_s_own_process_a_stop_stops_all() -> None:
    stopping.install()
    before = signal.getsignal(signal.SIGUSR2)
    worker.enter()
    assert signal.getsignal(signal.SIGUSR2) is before
    with pytest.raises(stopping.Stopped), worker.stopped_alone():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)


def test_all_jobs_of_a_sweep_are_stopped_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "LOOK", 0.05)
    first = job_in(tmp_path / "0")
    assert worker.running(tmp_path) == 1
    worker.stop_jobs(tmp_path)
    second = job_in(tmp_path / "1")  # begun behind the signal
    for one in (first, second):
        assert one.communicate(timeout=30)[0] == "SIGUSR1\n" and one.returncode == 0
    worker.wait_for_others(tmp_path)
    assert (worker.running(tmp_path), capsys.readouterr().out) == (0, "")


def test_waiting_for_what_still_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "LOOK", 0.05)
    (tmp_path / "plots").mkdir()
    process = job_in(tmp_path / "3")
    threading.Timer(0.5, process.terminate).start()
    worker.wait_for_others(tmp_path)
    process.communicate(timeout=30)
    assert capsys.readouterr().out == "waiting for jobs that still run: 1\n"
    with locked(tmp_path / "3" / LOCK, "it"):
        assert worker.running(tmp_path) == 1


def test_what_a_sweeper_optimises(tmp_path: Path) -> None:
    figures = {
        "status": "ok",
        "compressed/kl": 0.5,
        "compressed/bytes": 7,
        "compressed/stock": True,
        "model": "a",
    }
    write_report(tmp_path, figures)
    asked = {"objectives": ["compressed/bytes", "compressed/kl"]}
    assert worker.objectives(asked, tmp_path, 0) == (7.0, 0.5)
    assert worker.objectives({"objectives": None}, tmp_path, 0) is None
    for word in worker.objectives(asked, tmp_path, 1) or ():
        with pytest.raises(ValueError, match="the job failed"):
            float(word)
    for key in ("compressed/stock", "model", "finetuned/kl"):
        with pytest.raises(UserError, match=rf"no number at {key}; it has compressed/kl, comp"):
            worker.objectives({"objectives": [key]}, tmp_path, 0)
