"""A disk that fills up at any stage loses nothing; with room, the same command goes on."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import fault_jobs
import pytest
from fault_jobs import Fault
from fault_subjects import Subject, Subjects
from fuzzed import Tally
from mounting import mounted

SIZE = "16m"
FREE = (0, 3 * 4096, 16 * 4096)  # bytes that are left when a stage begins


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of our own; skipped where this user may not mount one."""
    with mounted(tmp_path / "disk", f"size={SIZE}") as folder:
        yield folder


def fill_up(
    subject: Subject, home: Path, disk: Path, where: str, fault: Fault, tally: Tally
) -> None:
    """Judge a run whose store's disk, or that of all its files, is full after some results.

    It says so in a line with exit code 2, and the next one, with room, goes on. What finds room in
    spite of that, such as a last small file, may end well, with the same files.
    """
    store = disk / "store"
    places = {"store": store} | ({"run_dir": disk / "run"} if where == "all" else {})
    run_dir = str(places.get("run_dir", "run"))
    full = fault_jobs.run(home, subject.overrides(**places), fault)
    known = fault_jobs.stamps(store)
    wrong = []
    if full.process.exitcode not in (0, 2) or not fault_jobs.no_traceback(full):
        wrong.append(f"exit {full.process.exitcode}: {full.text()[-1500:]}")
    if full.process.exitcode:
        tally.notes["refused in a line"] = str(1 + int(tally.notes.get("refused in a line", 0)))
        if os.strerror(errno.ENOSPC) not in full.text() and "is full" not in full.text():
            wrong.append(f"it does not say why: {full.text()[-500:]}")
    (disk / "ballast").unlink(missing_ok=True)
    again = fault_jobs.run(home, subject.overrides(**places))
    wrong += subject.wrong(again, run_dir) + subject.other_files(store)
    now = fault_jobs.stamps(store)
    wrong += [f"{one} was made twice" for one, stamp in known.items() if now.get(one) != stamp]
    for folder in (store, home, disk / "run"):
        shutil.rmtree(folder, ignore_errors=True)
    tally.judge(not wrong, f"{subject.name}, {where}, after {fault.number}: {'; '.join(wrong)}")


def test_a_full_disk(subjects: Subjects, tmp_path: Path, disk: Path, tally: Tally) -> None:
    fault = Fault(number=1, fill=str(disk))
    fill_up(subjects["small"], tmp_path / "home", disk, "store", fault, tally)
    assert tally.notes == {"refused in a line": "1"}
    tally.check()


@pytest.mark.faults
@pytest.mark.parametrize("name", ["recovered", "condensed"])
@pytest.mark.parametrize("where", ["store", "all"])
def test_a_full_disk_at_every_stage(
    name: str, where: str, subjects: Subjects, tmp_path: Path, disk: Path, tally: Tally
) -> None:
    subject = subjects[name]
    for number in range(len(fault_jobs.finished(subject.store))):
        fault = Fault(number=number, fill=str(disk), free=FREE[number % len(FREE)])
        fill_up(subject, tmp_path / "home", disk, where, fault, tally)
    tally.check()


@pytest.mark.faults
@pytest.mark.parametrize("place", ["store", "run_dir"])
def test_a_read_only_disk(
    place: str, subjects: Subjects, tmp_path: Path, disk: Path, tally: Tally
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    subject = subjects["small"]
    job = fault_jobs.run(tmp_path / "home", subject.overrides(**{place: disk / place}))
    words = os.strerror(errno.EROFS) in job.text() and fault_jobs.no_traceback(job)
    tally.judge(words and job.process.exitcode == 2, job.text()[-1500:])
    tally.check()
