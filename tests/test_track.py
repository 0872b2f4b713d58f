"""Tracking: offline files hold what was logged, and W&B's trouble is never the run's."""

from __future__ import annotations

import builtins
import logging
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_lab import track
from moe_lab.track import Tracker
from moe_lab.types import UserError

BLOCK = 32768  # W&B's offline file is a LevelDB log: blocks of chunks (crc32, length, type, data)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings or keys of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def records(folder: Path) -> Iterator[Any]:
    """The records of the one offline run under `folder`."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    content, position, whole = path.read_bytes(), 7, b""  # 7 bytes of W&B's own header
    while position + 7 <= len(content):
        if BLOCK - position % BLOCK < 7:
            position += BLOCK - position % BLOCK
        length, kind = struct.unpack("<HB", content[position + 4 : position + 7])
        if position + 7 + length > len(content):
            return  # still being written
        whole += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            yield Record.FromString(whole)
            whole = b""


def items(entries: Any) -> dict[str, str]:
    return {entry.key or "/".join(entry.nested_key): entry.value_json for entry in entries}


def use(tracker: Tracker, folder: Path, name: str = "job") -> None:
    folder.mkdir(exist_ok=True)
    (folder / "plan.json").write_text("{}")
    tracker.start(folder, {"seed": 7, "method": {"name": "prune"}}, "sweep", name, ["tiny"])
    tracker.log({"loss": 2.5}, step=0)
    tracker.log({"loss": 1.25}, step=1)
    tracker.table("result", ["a", "b"], [[1, "x"], [2, "y"]])
    tracker.artifact(folder / "plan.json", "plan of job=1", "plan")
    tracker.summary({"status": "ok", "dense/eval/average": 0.75, "error": None})
    tracker.finish(0)


def read_back(folder: Path) -> dict[str, Any]:
    """What the finished run under `folder` holds; its file is complete a moment after finish."""
    until = time.monotonic() + 30
    while "exit" not in (found := read_now(folder)):
        assert time.monotonic() < until, f"no exit record among {found}"
        time.sleep(0.05)
    return found


def read_now(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"config": {}, "history": [], "summary": {}, "artifacts": []}
    for record in records(folder):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found |= {"name": record.run.display_name, "group": record.run.run_group}
            found["config"] |= items(record.run.config.update)
        elif kind == "history":
            found["history"].append(items(record.history.item))
        elif kind == "summary":
            found["summary"] |= items(record.summary.update)
        elif kind == "artifact":
            found["artifacts"].append((record.artifact.name, record.artifact.type))
        elif kind == "exit":
            found["exit"] = record.exit.exit_code
    return found


def test_offline_files_hold_everything(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    tracker = Tracker("offline")
    use(tracker, tmp_path / "run")
    found = read_back(tmp_path / "run")
    assert (found["name"], found["group"], found["exit"]) == ("job", "sweep", 0)
    assert found["config"]["seed"] == "7"
    assert found["config"]["method"] == '{"name":"prune"}'
    assert [row["loss"] for row in found["history"] if "loss" in row] == ["2.5", "1.25"]
    assert found["summary"]["dense/eval/average"] == "0.75"
    assert found["summary"]["status"] == '"ok"'
    assert ("plan-of-job-1", "plan") in found["artifacts"]
    assert any("result/nrows" in row for row in found["history"])
    assert tracker.url is None
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_offline_makes_no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("WANDB_BASE_URL", address)
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
        use(Tracker("offline"), tmp_path / "run")
        server.settimeout(1.0)
        with pytest.raises(TimeoutError):
            server.accept()


def test_several_runs_in_one_process(tmp_path: Path) -> None:
    before = dict(os.environ)
    again = Tracker("offline")
    use(again, tmp_path / "a", "a")
    use(again, tmp_path / "b", "b")
    use(Tracker("offline"), tmp_path / "c", "c")
    assert [read_back(tmp_path / name)["name"] for name in "abc"] == ["a", "b", "c"]
    changed = {key for key, value in os.environ.items() if before.get(key) != value}
    assert not changed & {"WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ERROR_REPORTING"}


def test_failed_job_is_marked(tmp_path: Path) -> None:
    tracker = Tracker("offline")
    tracker.start(tmp_path, {}, "sweep", "job", [])
    tracker.finish(1)
    assert read_back(tmp_path)["exit"] == 1


def test_online_without_a_key_asks_nothing_and_goes_offline(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(prompt: str = "") -> str:
        raise AssertionError(f"asked: {prompt}")

    monkeypatch.setattr(builtins, "input", refuse)
    use(Tracker("online"), tmp_path)
    assert "no API key" in caplog.text
    assert "goes on offline" in caplog.text
    assert read_back(tmp_path)["summary"]["dense/eval/average"] == "0.75"


@pytest.mark.slow
def test_unreachable_server_goes_offline(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(track, "CONNECT_SECONDS", 2.0)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the discard port: refused
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    use(Tracker("online"), tmp_path)
    assert "failed at connecting" in caplog.text
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert path.stat().st_size > 0


def test_missing_wandb_fails_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    use(Tracker("offline"), tmp_path)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "cannot be imported" in caplog.text


@pytest.mark.parametrize("broken", ["init", "log", "Table", "log_artifact", "finish"])
def test_broken_wandb_warns_once_and_fails_nothing(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    broken: str,
) -> None:
    import wandb

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("the moon is full")

    holder = wandb.Run if broken in ("log", "log_artifact", "finish") else wandb
    real_finish = wandb.Run.finish
    opened = []
    real_init = wandb.init
    monkeypatch.setattr(
        wandb, "init", lambda **settings: opened.append(real_init(**settings)) or opened[-1]
    )
    monkeypatch.setattr(holder, broken, fail)
    use(Tracker("offline"), tmp_path)
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "OSError: the moon is full" in warnings[0].getMessage()
    for run in opened:
        real_finish(run)


def test_off_touches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    use(Tracker("off"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_unknown_mode_lists_what_exists() -> None:
    with pytest.raises(UserError, match=r"'ofline' is unknown; track=online\|offline\|off"):
        Tracker("ofline")
