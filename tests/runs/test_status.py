"""Jobs and their status, by what they left."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from made_up_runs import HOUR_AGO, Stored, age, start

from moe_lab.runs.status import find_jobs, settings_apart
from moe_lab.types import UserError


def test_statuses_in_the_order_of_the_jobs(sweep: Path) -> None:
    found = find_jobs(sweep)
    assert [job.folder.name for job in found] == [str(number) for number in range(11)]
    states = ["ok", "failed", "killed", "running", "killed", *["missing"] * 5, "ok"]
    assert [job.status for job in found] == states
    assert {job.sweep.folder for job in found} == {sweep}


def test_a_job_of_another_process_is_running_until_it_is_killed(sweep: Path) -> None:
    code = "import sys, filelock as f; l = f.FileLock(sys.argv[1]); l.acquire(); print(); input()"
    command = [sys.executable, "-c", code, str(sweep / "2" / "job.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"\n"
        assert find_jobs(sweep)[2].status == "running"
        process.kill()
    assert find_jobs(sweep)[2].status == "killed"


def test_a_job_that_is_being_run_again_is_running(sweep: Path) -> None:
    with FileLock(sweep / "1" / "job.lock"):
        assert find_jobs(sweep)[1].status == "running"
    assert find_jobs(sweep)[1].status == "failed"


def test_a_job_that_just_started_is_not_called_killed(sweep: Path) -> None:
    age(sweep / "4" / ".hydra" / "config.yaml", -HOUR_AGO)
    assert find_jobs(sweep)[4].status == "running"


def test_stages_and_times(sweep: Path) -> None:
    found = find_jobs(sweep)
    assert found[0].stages == ["profile", "plan"]
    assert (found[0].num_cached, found[0].seconds(True), found[0].seconds(False)) == (1, 100, 3)
    assert found[10].elapsed == 125.0
    assert found[3].elapsed == pytest.approx(3600, abs=60)  # until now
    age(sweep / "2" / "report.json", -600)
    assert find_jobs(sweep)[2].elapsed == pytest.approx(3000, abs=60)  # until its last report
    assert found[5].elapsed is None


def test_settings_are_what_differs(place: Path) -> None:
    start(place / "s" / "0", ["a=1", "b=1", "run_dir=x"], place)
    start(place / "s" / "1", ["a=1", "b=2", "run_dir=y"], place)
    start(place / "alone", ["a=1", "hydra.verbose=true", "+c=[1,2]"], place)
    found = settings_apart(find_jobs(place))
    assert [found[place / name] for name in ("s/0", "s/1", "alone")] == [
        "b=1",
        "b=2",
        "a=1 +c=[1,2]",
    ]


def test_a_result_is_no_job(stored: Stored) -> None:
    with pytest.raises(UserError, match="has no runs"):
        find_jobs(stored.store.root)
