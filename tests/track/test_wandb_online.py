"""Tracking against a small W&B server: what a run sends, resumes, and what `wandb sync` uploads."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb
from wandb_files import CONFIG, ROWS, as_user_of, isolate, prepare, use
from wandb_server import Server, serving

from moe_lab.track import wandb as track_wandb
from moe_lab.track.tracker import stable_hash
from moe_lab.track.wandb import WandbTracker

pytestmark = pytest.mark.slow
RUN = stable_hash("sweep/0")
JOB = {"identity": "sweep/0"}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    isolate(monkeypatch, tmp_path)
    with serving() as made:
        as_user_of(made.address, monkeypatch)
        yield made
        assert not made.troubles
    wandb.teardown()


def interrupted(tracker: WandbTracker, folder: Path) -> None:
    """A job that stopped at its second row."""
    prepare(folder)
    tracker.start(folder, CONFIG, "sweep", "job", ["tiny"], **JOB)
    for row in ROWS[:2]:
        tracker.log_curve(row)
    tracker.finish(1)


def losses(server: Server) -> list[float]:
    return [row["finetune/lm/loss"] for row in server.rows(RUN) if "finetune/lm/loss" in row]


def assert_whole(server: Server) -> None:
    """One run with every point once, its links, and its last exit code."""
    assert list(server.runs) == [RUN]
    assert losses(server) == [2.5, 1.25]
    steps = [row["_step"] for row in server.rows(RUN)]
    assert steps == list(range(len(steps)))
    assert server.exits[RUN] == [1, 0]
    assert server.config(RUN)["finetune/phases/lm/learning_rate"] == 1e-4
    names = {"model-ab12", "profile-cd34", "plan-of-job-1", "checkpoint-ef56"}
    assert names <= set(server.artifacts)
    assert {name for _, name in server.used} == {"model-ab12", "profile-cd34"}
    assert server.artifacts["plan-of-job-1"]["runName"] == RUN


def test_online_resumes(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    interrupted(WandbTracker("online"), tmp_path / "run")
    assert losses(server) == [2.5]
    tracker = WandbTracker("online")
    use(tracker, tmp_path / "run", **JOB)
    assert_whole(server)
    sent = server.runs[RUN]
    assert (sent["groupName"], sent["displayName"], sent["jobType"]) == ("sweep", "job", "job")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_server_without_the_run_gets_all_points(server: Server, tmp_path: Path) -> None:
    interrupted(WandbTracker("offline"), tmp_path / "run")
    use(WandbTracker("online"), tmp_path / "run", **JOB)
    assert losses(server) == [2.5, 1.25]


def test_sync_uploads_a_restarted_job_as_one_run(server: Server, tmp_path: Path) -> None:
    interrupted(WandbTracker("offline"), tmp_path / "run")
    use(WandbTracker("offline"), tmp_path / "run", **JOB)
    assert not server.operations
    command = [sys.executable, "-m", "wandb", "sync", str(tmp_path / "run" / "wandb")]
    subprocess.run(command, check=True, capture_output=True, timeout=120, cwd=tmp_path)
    assert_whole(server)


def test_a_lost_server_costs_one_wait(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(track_wandb, "UPLOAD_SECONDS", 2.0)
    isolate(monkeypatch, tmp_path)
    prepare(tmp_path)
    tracker = WandbTracker("online")
    with serving() as server:
        as_user_of(server.address, monkeypatch)
        tracker.start(tmp_path, CONFIG, "sweep", "job", [])
        assert tracker.url
    started = time.monotonic()
    for number in range(5):
        tracker.artifact(tmp_path / "plan.json", f"plan-{number}", "plan")
    tracker.finish(0)
    wandb.teardown()
    assert time.monotonic() - started < 90
    assert [record.levelno for record in caplog.records].count(logging.WARNING) == 1
