"""run.py as processes that can be killed, forked where all is imported: each starts at once.

`Faults` are done in the process itself: killed at the n-th file that is finished, a disk that is
full from there on.
"""

from __future__ import annotations

import functools
import importlib
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

from running import ROOT, SUPPORT

DONE = "artifact.json"


@dataclass(frozen=True)
class Fault:
    """What befalls a process when it replaces a file of this name for the n-th time (from 1).

    kill: before or after that; fill: a folder whose disk is full after it, but for `free` bytes.
    """

    name: str = DONE
    number: int = 1
    kill: str = ""
    fill: str = ""
    free: int = 0


class Job:
    """One process of run.py; its output lies in `home`/log."""

    def __init__(self, home: Path, overrides: Sequence[str], fault: Fault | None = None) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.home, self.log = home, home / "log"
        self.process = _server().Process(target=_run, args=(home, list(overrides), fault))
        self.process.start()

    def kill(self) -> None:
        """SIGKILL, also where it has ended by itself."""
        self.process.kill()
        self.process.join()

    def wait(self, seconds: float = 300) -> int:
        """Its exit code; AssertionError where it does not end in time."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.kill()
            raise AssertionError(f"did not end within {seconds:g} s:\n{self.text()}")
        return self.process.exitcode

    def text(self) -> str:
        """All that it printed."""
        return self.log.read_text(errors="replace") if self.log.is_file() else ""

    @property
    def killed(self) -> bool:
        """Whether it was still at work when it was killed."""
        return self.process.exitcode == -signal.SIGKILL


@functools.cache
def _server() -> Any:
    """A process that has imported all and is forked; it does not take over our sys.path."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fault_imports"])
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), str(SUPPORT)])):
        forkserver.ensure_running()
    return context


def run(home: Path, overrides: Sequence[str], fault: Fault | None = None) -> Job:
    """A job to its end."""
    job = Job(home, overrides, fault)
    job.wait()
    return job


def _run(home: Path, overrides: list[str], fault: Fault | None) -> None:
    os.chdir(home)
    output = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # Not where all is imported: a worker that has a fork server already takes that one.
    importlib.import_module("moe_lab.runs.job")._drawn = lambda *_: []  # no results, but slow
    if fault:
        _befall(fault)
    sys.argv = [str(ROOT / "run.py"), *overrides]
    runpy.run_path(sys.argv[0], run_name="__main__")


def _befall(fault: Fault) -> None:
    """Have the fault happen in this process."""
    replace, count = os.replace, 0  # by which Path.replace replaces, too

    def around(source: Any, target: Any, **folders: Any) -> None:
        nonlocal count
        count += Path(target).name == fault.name
        due = Path(target).name == fault.name and count == fault.number
        if due and fault.kill == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target, **folders)
        if due and fault.kill == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        if due and fault.fill:
            fill(Path(fault.fill), fault.free)

    os.replace = around
    if fault.fill:  # that there is too little room is found before any work, and not tried here
        usage = shutil.disk_usage("/")._replace(free=2**50)
        shutil.disk_usage = lambda path: usage
        if not fault.number:
            fill(Path(fault.fill), fault.free)


def fill(disk: Path, free: int) -> None:
    """Leave so many bytes of a small disk free."""
    with (disk / "ballast").open("wb", buffering=0) as ballast:
        try:
            while True:
                ballast.write(bytes(4096))
        except OSError:
            ballast.truncate(max(0, os.fstat(ballast.fileno()).st_size - free))


def report(home: Path, folder: str = "run") -> dict[str, Any]:
    """A job's report; empty where there is none."""
    path = home / folder / "report.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What differs between two reports of the same request, beside times and places."""
    from moe_lab.runs.reproducing import MADE_BY, compared

    found = compared(one, other)[1]
    return [f"{key}: {then} against {now}" for key, then, now in found if not MADE_BY.match(key)]


def contents(store: Path) -> dict[str, bytes]:
    """The files of all finished results that hold no times, by their paths in the store."""
    from moe_lab.runs.reproducing import EXACT

    return {
        str(path.relative_to(store)): path.read_bytes()
        for folder in finished(store)
        if folder.parent.name in EXACT
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (DONE, "README.md") and path.suffix != ".partial"
    }


def finished(store: Path) -> list[Path]:
    """The folders of all finished results."""
    found = (path.parent for path in sorted(store.glob(f"*/*/{DONE}")))
    return [folder for folder in found if ".damaged" not in folder.name]


def stamps(store: Path) -> dict[Path, int]:
    """When each finished result was written."""
    return {folder: (folder / DONE).stat().st_mtime_ns for folder in finished(store)}


def no_traceback(job: Job) -> bool:
    """Whether no traceback was printed."""
    return "Traceback (most recent call last)" not in job.text()
