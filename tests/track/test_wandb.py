"""Tracking: offline files hold what was logged, and W&B's trouble is never the run's."""

from __future__ import annotations

import builtins
import logging
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb_files import as_user_of, isolate, read_one, use

from moe_lab.track import wandb as track_wandb
from moe_lab.track.wandb import WandbTracker
from moe_lab.types import UserError


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    isolate(monkeypatch, tmp_path)
    yield
    if "WANDB_API_KEY" in os.environ:
        wandb.teardown()  # so that no later test has this one's key


def test_offline_makes_no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        as_user_of(address, monkeypatch)
        use(WandbTracker("offline"), tmp_path / "run")
        server.settimeout(1.0)
        with pytest.raises(TimeoutError):
            server.accept()


def test_several_runs_in_one_process(tmp_path: Path) -> None:
    before = dict(os.environ)
    again = WandbTracker("offline")
    use(again, tmp_path / "a", "a")
    use(again, tmp_path / "b", "b")
    use(WandbTracker("offline"), tmp_path / "c", "c")
    names = [read_one(tmp_path / name).run["display_name"] for name in "abc"]
    assert names == ["a", "b", "c"]
    changed = {key for key, value in os.environ.items() if before.get(key) != value}
    assert not changed & {"WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ERROR_REPORTING"}


def test_failed_job_is_marked(tmp_path: Path) -> None:
    tracker = WandbTracker("offline")
    tracker.start(tmp_path, {}, "sweep", "job", [])
    tracker.finish(1)
    assert read_one(tmp_path).exit_code == 1


def test_online_without_a_key_asks_nothing_and_goes_offline(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(prompt: str = "") -> str:
        raise AssertionError(f"asked: {prompt}")

    monkeypatch.setattr(builtins, "input", refuse)
    use(WandbTracker("online"), tmp_path)
    assert "no API key" in caplog.text
    assert "goes on offline" in caplog.text
    assert read_one(tmp_path).summary["dense/eval/average"] == 0.75


@pytest.mark.slow
def test_unreachable_server_goes_offline(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(track_wandb, "CONNECT_SECONDS", 2.0)
    as_user_of("http://127.0.0.1:9", monkeypatch)  # the discard port: refused
    use(WandbTracker("online"), tmp_path)
    assert "failed at connecting" in caplog.text
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert path.stat().st_size > 0


def test_missing_wandb_fails_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    use(WandbTracker("offline"), tmp_path)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "cannot be imported" in caplog.text


@pytest.mark.parametrize("broken", ["init", "log", "Table", "log_artifact", "finish"])
def test_broken_wandb_warns_once_and_fails_nothing(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    broken: str,
) -> None:
    class Broken:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise OSError("the moon is full")

    holder = wandb.Run if broken in ("log", "log_artifact", "finish") else wandb
    real_finish = wandb.Run.finish
    opened = []
    real_init = wandb.init
    monkeypatch.setattr(
        wandb, "init", lambda **settings: opened.append(real_init(**settings)) or opened[-1]
    )
    monkeypatch.setattr(holder, broken, Broken)
    use(WandbTracker("offline"), tmp_path)
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "OSError: the moon is full" in warnings[0].getMessage()
    for run in opened:
        real_finish(run)


def test_off_touches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    use(WandbTracker("off"), tmp_path)
    assert not (tmp_path / "wandb").exists()


def test_unknown_mode_lists_what_exists() -> None:
    with pytest.raises(UserError, match=r"track\.mode=ofline: there are online, offline, off"):
        WandbTracker("ofline")
