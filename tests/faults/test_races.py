"""Many processes at one store, some of them killed: each result is made once, all give the same."""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path

import fault_jobs
import pytest
from fault_jobs import Job
from fault_subjects import Subject, Subjects
from fuzzed import Tally

PROCESSES = 8


def race(subject: Subject, home: Path, processes: int, kills: int, seed: int, tally: Tally) -> None:
    """Start all at once, kill some while they work, start these again, and look at all ends."""
    draw = random.Random(seed)
    store = home / "store"
    homes = [home / f"process{number}" for number in range(processes)]
    jobs = [Job(one, subject.overrides(store=store)) for one in homes]
    for _ in range(kills):
        time.sleep(draw.uniform(0.1, 1.5))
        number = draw.randrange(processes)
        jobs[number].kill()
        if jobs[number].killed:
            tally.notes["killed"] = str(int(tally.notes.get("killed", 0)) + 1)
        jobs[number] = Job(homes[number], subject.overrides(store=store))
    made: Counter[str] = Counter()
    for job in jobs:
        job.wait()
        wrong = subject.wrong(job)
        tally.judge(not wrong, "; ".join(wrong))
        report = fault_jobs.report(job.home)
        made.update(
            report[key]
            for key in report
            if key.startswith("artifact/")
            and report.get(f"cached/{key.partition('/')[2]}") is False
        )
    twice = [result for result, number in made.items() if number > 1]
    assert not twice, f"made more than once: {twice}"
    assert not subject.other_files(store)


def test_processes_race(subjects: Subjects, tmp_path: Path, tally: Tally) -> None:
    race(subjects["small"], tmp_path, 3, 1, 0, tally)
    tally.check()


@pytest.mark.faults
@pytest.mark.parametrize(
    ("name", "seed"), [("recovered", 1), ("condensed", 2), ("condensed", 3), ("small", 4)]
)
def test_processes_race_with_kills(
    name: str, seed: int, subjects: Subjects, tmp_path: Path, tally: Tally
) -> None:
    race(subjects[name], tmp_path, PROCESSES, 6, seed, tally)
    tally.check()
