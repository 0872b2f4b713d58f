"""A sweep's jobs in processes that a launcher started, and the process that waits for them.

A job takes the signals as run.py does. submitit's warning, before a time limit or at a preemption,
stops it with all it has saved, and hands it back to submitit, which queues it again; there it goes
on. Where the waiting process is stopped, its jobs on this machine are, too. As light as sweep.py.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_lab import stopping
from moe_lab.files import LOCK
from moe_lab.types import UserError

Objectives = tuple[float | str, ...]
LOOK = 0.5  # seconds between two looks at which jobs run


@dataclass
class _State:
    entered: bool = False
    resubmit: dict[int, Callable[[int, None], object]] = field(default_factory=dict)  # by signal


_state = _State()


@dataclass
class Given:
    """What a job gives to its sweeper; None where it gives nothing, or was stopped."""

    objectives: Objectives | None = None


def enter() -> None:
    """Take the signals in a process that a launcher started; what submitit does on one is kept."""
    if stopping.installed() or threading.current_thread() is not threading.main_thread():
        return
    if "SUBMITIT_EXECUTOR" in os.environ:
        for one in stopping.WARNINGS:
            before = signal.getsignal(one)
            if callable(before):
                _state.resubmit[one] = before
    stopping.install()
    _state.entered = True


@contextmanager
def stopped_alone() -> Iterator[Given]:
    """In a launcher's process, where the job within is stopped, others save what they have, too.

    submitit's warning queues the job again, and the process ends. Otherwise the launcher is told
    nothing (joblib would kill the others at once): the job's report says what happened.
    """
    given = Given()
    try:
        yield given
    except KeyboardInterrupt:
        for number, resubmit in _state.resubmit.items():
            if stopping.came(number):
                resubmit(number, None)
        if not _state.entered:
            raise


def stop_jobs(folder: Path) -> None:
    """Stop each job of a sweep that runs on this machine, also those that begin later.

    By a warning, which a job that has been told already (Ctrl-C in a terminal) does not mind.
    """
    threading.Thread(target=_stop_jobs, args=(folder,), daemon=True).start()


def _stop_jobs(folder: Path) -> None:
    from moe_lab.locks import held, holder_of

    told = {os.getpid()}
    while True:
        for lock in _locks(folder):
            holder = holder_of(lock)
            if holder and holder.here and holder.pid not in told and held(lock):
                told.add(holder.pid)
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(holder.pid, signal.SIGUSR1)
        time.sleep(LOOK)


def running(folder: Path) -> int:
    """How many jobs of a sweep run now, on whatever machine."""
    from moe_lab.locks import held

    return sum(map(held, _locks(folder)))


def _locks(folder: Path) -> list[Path]:
    return [one / LOCK for one in folder.iterdir() if one.name.isdecimal()]


def wait_for_others(folder: Path) -> None:
    """Wait while jobs of a sweep run, as where a launcher gave up at the first that was lost."""
    if number := running(folder):
        print(f"waiting for {number} jobs that still run", flush=True)
    while running(folder):
        time.sleep(LOOK)


def objectives(config: Mapping[str, Any], folder: Path, code: int) -> Objectives | None:
    """What a sweeper optimises: the figures of a job's report that the config names; None for none.

    Where the job failed, text: a sweeper cannot take it for a number, and counts a failed trial,
    where NaN would end its study. UserError for a key that the report has not, or no number at.
    """
    from moe_lab.report.report import read_report

    keys: Sequence[str] | None = config["objectives"]
    if not keys:
        return None
    if code:
        return (f"the job failed, see {folder}",) * len(keys)
    report = read_report(folder)
    return tuple(_figure(report, key) for key in keys)


def _figure(report: Mapping[str, Any], key: str) -> float:
    value = report.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        figures = (k for k, v in report.items() if isinstance(v, float) or type(v) is int)
        raise UserError(
            f"objectives: the job's report has no number at {key}; it has {', '.join(figures)}"
        )
    return float(value)
