"""Killed at any moment, the same command goes on and ends with the same bytes."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import fault_jobs
import pytest
from fault_jobs import Fault, Job
from fault_subjects import Subject, Subjects
from fuzzed import Tally

from moe_lab.finetune.training import STATE
from moe_lab.models.write_journal import JOURNAL
from moe_lab.stages.journal import RECORD

SEEDS = range(12)
KILLS = 3  # of one run, until it is let go on to its end


def judge_kill(home: Path, known: dict[Path, int], tally: Tally) -> dict[Path, int]:
    """What is finished after a kill, which all that was before has to be still."""
    now = fault_jobs.stamps(home / "store")
    lost = [str(one) for one, stamp in known.items() if now.get(one) != stamp]
    tally.judge(not lost, f"lost after a kill: {lost}")
    return now


def judge_end(subject: Subject, home: Path, known: dict[Path, int], job: Job) -> str:
    """What of a run's end is not as if nothing had happened; empty where all is."""
    store = home / "store"
    wrong = subject.wrong(job) + subject.other_files(store)
    now = fault_jobs.stamps(store)
    wrong += [f"{one} was made twice" for one, stamp in known.items() if now.get(one) != stamp]
    if not subject.sweep and not wrong:
        wrong += _said_cached(
            subject.reports(home)[0], {f"{k.parent.name}/{k.name}" for k in known}
        )
    return "; ".join(wrong)


def _said_cached(report: dict, known: set[str]) -> list[str]:
    """Stages whose results were there, and that do not say so; or the other way round."""
    made = {key.partition("/")[2]: value for key, value in report.items() if "artifact/" in key}
    return [
        f"cached/{stage} is {report[f'cached/{stage}']}"
        for stage, result in made.items()
        if f"cached/{stage}" in report and report[f"cached/{stage}"] != (result in known)
    ]


def chain(subject: Subject, home: Path, faults: list[Fault], tally: Tally) -> None:
    """Start a run again and again, each time killed at its first finished result, to its end."""
    known: dict[Path, int] = {}
    for _ in range(100):
        job = fault_jobs.run(home, subject.overrides(), faults[tally.tried % len(faults)])
        if not job.killed:
            break
        known = judge_kill(home, known, tally)
    assert known
    wrong = judge_end(subject, home, known, job)
    assert not wrong, wrong


def test_a_kill_at_each_boundary(subjects: Subjects, tmp_path: Path, tally: Tally) -> None:
    chain(subjects["small"], tmp_path, [Fault(kill="after")], tally)
    assert tally.tried == 3
    tally.check()


@pytest.mark.faults
@pytest.mark.parametrize("name", ["recovered", "condensed", "quantized", "sweep"])
def test_kills_at_every_boundary(
    name: str, subjects: Subjects, tmp_path: Path, tally: Tally
) -> None:
    """Before each result is finished, with all of its files but the record there, and after it."""
    chain(subjects[name], tmp_path, [Fault(kill="before"), Fault(kill="after")], tally)
    assert tally.tried == 2 * len(fault_jobs.finished(subjects[name].store))
    tally.check()


@pytest.mark.faults
@pytest.mark.parametrize("name", ["recovered", "condensed"])
def test_a_kill_in_fine_tuning(name: str, subjects: Subjects, tmp_path: Path, tally: Tally) -> None:
    subject = subjects[name]
    killed = fault_jobs.run(tmp_path, subject.overrides(), Fault(STATE, kill="after"))
    assert killed.killed and list(tmp_path.glob(f"store/finetune/*/{STATE}"))
    known = fault_jobs.stamps(tmp_path / "store")
    wrong = judge_end(subject, tmp_path, known, fault_jobs.run(tmp_path, subject.overrides()))
    tally.judge(not wrong, f"{name}: {wrong}")
    tally.check()


@pytest.mark.faults
def test_a_kill_in_a_profile(subjects: Subjects, tmp_path: Path, tally: Tally) -> None:
    """At each save of its journal, until it ends."""
    subject = subjects["small"]
    command = [*subject.overrides(), "compute.layerwise=true", "compute.journal_seconds=0"]
    for number in range(1, 100):
        kill = ("before", "after")[number % 2]
        job = fault_jobs.run(tmp_path, command, Fault(RECORD, number=2, kill=kill))
        if not job.killed:
            break
        assert list(tmp_path.glob(f"store/profile/*/journal.0/{RECORD}"))
        tally.judge(True, "")
    wrong = judge_end(subject, tmp_path, {}, job)
    tally.judge(number > 2 and not wrong, wrong)
    tally.check()


@pytest.mark.faults
@pytest.mark.parametrize("kill", ["before", "after"])
def test_a_kill_in_quantizing(kill: str, subjects: Subjects, tmp_path: Path, tally: Tally) -> None:
    """At what is noted of each layer, in an attempt of its own each time."""
    subject = subjects["quantized"]
    for number in range(1, 100):
        home = tmp_path / str(number)
        shutil.copytree(subject.home, home)
        shutil.rmtree(home / "store" / "quantize")  # all else is there
        killed = fault_jobs.run(home, subject.overrides(), Fault(JOURNAL, number=number, kill=kill))
        if not killed.killed:
            break
        known = fault_jobs.stamps(home / "store")
        wrong = judge_end(subject, home, known, fault_jobs.run(home, subject.overrides()))
        tally.judge(not wrong, f"at note {number}: {wrong}")
    assert number > 2
    tally.check()


@pytest.mark.faults
@pytest.mark.parametrize("seed", SEEDS)
def test_kills_at_random(seed: int, subjects: Subjects, tmp_path: Path, tally: Tally) -> None:
    """Each KILLS times, at moments that are drawn; the seed draws them again."""
    draw = random.Random(seed)
    subject = subjects[("recovered", "condensed", "sweep")[seed % 3]]
    started = time.monotonic()
    if subject.name == "recovered":  # its pictures take most of the time
        subject = subjects["condensed"] if seed % 2 else subject
    known: dict[Path, int] = {}
    home = tmp_path / "0"
    while tally.tried < KILLS and time.monotonic() < started + 240:
        job = Job(home, subject.overrides())
        time.sleep(draw.uniform(0.3, 6))
        job.kill()
        if job.killed:
            known = judge_kill(home, known, tally)
        elif tally.tried:
            break
        else:  # it ended before its first kill, and begins anew
            home = home.with_name(f"{int(home.name) + 1}")
    wrong = judge_end(subject, home, known, fault_jobs.run(home, subject.overrides()))
    assert not wrong, f"seed {seed}: {wrong}"
    tally.check()
