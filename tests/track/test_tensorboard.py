"""TensorBoard: its event files, read back, and a run without its writer."""

from __future__ import annotations

import logging
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from moe_lab.track.tensorboard import TensorBoardTracker
from moe_lab.track.tracker import TrackedArtifact

CONFIG = {"method": {"_target_": "x", "name": "prune"}, "ratio": {"ratio": 0.5}, "seed": 7}
ROWS = [{"phase": "lm", "step": step, "tokens": 10 * step, "loss": 3.0 - step} for step in range(4)]


def events(folder: Path) -> Iterator[Any]:
    """Every value in the event files of a folder; a record is length, crc, content, crc."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.glob("events.out.*")):
        content, position = path.read_bytes(), 0
        while position < len(content):
            (length,) = struct.unpack("<Q", content[position : position + 8])
            event = Event.FromString(content[position + 12 : position + 12 + length])
            position += length + 16
            yield from ((event.step, value) for value in event.summary.value)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for step, value in events(folder):
        if value.WhichOneof("value") == "simple_value":
            found.setdefault(value.tag, []).append((step, value.simple_value))
    return found


def texts(folder: Path) -> dict[str, str]:
    return {
        value.tag.removesuffix("/text_summary"): value.tensor.string_val[0].decode()
        for _, value in events(folder)
        if value.WhichOneof("value") == "tensor"
    }


def use(tracker: TensorBoardTracker, folder: Path, rows: list[dict[str, Any]]) -> None:
    tracker.start(folder, CONFIG, "sweep", "job", ["tiny", "prune"], identity="sweep/0")
    for row in rows:
        tracker.log_curve(row)
    tracker.table("result", ["figure", "dense"], [["loss | a", 1], ["none", None]])
    tracker.images([folder / "loss.png"])
    tracker.html("page", folder / "index.html")
    tracker.artifact(folder / "plan.json", "plan-1", "plan")
    tracker.artifacts(
        [TrackedArtifact("plan-1", "plan", (folder / "plan.json",), made_from=("profile-1",))]
    )
    tracker.summary({"status": "ok", "compressed/parameters": 123_456_789_012, "dense/acc": 0.75})
    tracker.finish(0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 4), "red").save(tmp_path / "loss.png")
    return tmp_path


def test_files_hold_everything(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("tensorboardX")
    tracker = TensorBoardTracker()
    use(tracker, folder, ROWS)
    files = folder / "tensorboard"
    found = scalars(files)
    assert found["finetune/lm/loss"] == [(0, 3.0), (1, 2.0), (2, 1.0), (3, 0.0)]
    assert found["finetune_over_tokens/lm/loss"] == [(0, 3.0), (10, 2.0), (20, 1.0), (30, 0.0)]
    told = texts(files)
    assert told["run"].splitlines()[2] == "| name | job |"
    assert told["result"] == "| figure | dense |\n| --- | --- |\n| loss \\| a | 1 |\n| none |  |"
    assert "| plan-1 | plan | profile-1 | made |" in told["artifacts"]
    assert "index.html" in told["page"]
    assert "| status | ok |" in told["report"]
    (picture,) = [value.image for _, value in events(files) if value.tag == "plots/loss"]
    assert (picture.width, picture.height) == (8, 4)
    report = scalars(files / "report")
    assert report["dense/acc"][0][1] == 0.75
    assert report["compressed/parameters"][0][1] == pytest.approx(123_456_789_012)
    sessions = [value for _, value in events(files / "report") if "session_start" in value.tag]
    content = sessions[0].metadata.plugin_data.content
    assert all(word in content for word in (b"method/name", b"prune", b"ratio/ratio"))
    assert tracker.url is None
    assert not caplog.records


def test_a_restarted_job_logs_no_point_twice(folder: Path) -> None:
    pytest.importorskip("tensorboardX")
    use(TensorBoardTracker(), folder, ROWS[:2])
    tracker = TensorBoardTracker()
    for rows in (ROWS[:3], ROWS, ROWS):
        use(tracker, folder, rows)
    found = scalars(folder / "tensorboard")
    assert [step for step, _ in found["finetune/lm/loss"]] == [0, 1, 2, 3]


def test_a_missing_writer_fails_nothing(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    use(TensorBoardTracker(), folder, ROWS)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "pip install 'moe_lab[tensorboard]'" in record.getMessage()
    assert not (folder / "tensorboard").exists()


def test_a_missing_picture_costs_only_itself(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tensorboardX")
    (folder / "loss.png").unlink()
    use(TensorBoardTracker(), folder, ROWS)
    (record,) = caplog.records
    assert "loss.png" in record.getMessage()
    assert scalars(folder / "tensorboard" / "report")["dense/acc"]
