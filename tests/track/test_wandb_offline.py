"""Offline files hold the config, curves, summary, table and artifacts, as W&B reads them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from wandb_files import (
    CONFIG,
    ROWS,
    Offline,
    isolate,
    prepare,
    read_back,
    read_one,
    read_summary,
    use,
)

from moe_lab.track.tracker import stable_hash
from moe_lab.track.wandb import WandbTracker


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    isolate(monkeypatch, tmp_path)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where a whole job was tracked."""
    with pytest.MonkeyPatch.context() as patch:
        made = tmp_path_factory.mktemp("tracked")
        isolate(patch, made)
        use(WandbTracker("offline"), made)
        yield made


@pytest.fixture(scope="module")
def found(folder: Path) -> Offline:
    return read_one(folder)


def test_nothing_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    tracker = WandbTracker("offline")
    use(tracker, tmp_path, identity="sweep/0")
    assert tracker.url is None
    assert not warnings(caplog)
    assert capfd.readouterr() == ("", "")


def test_the_run_its_config_and_summary(folder: Path, found: Offline) -> None:
    run = found.run
    assert (run["display_name"], run["run_group"], run["job_type"]) == ("job", "sweep", "job")
    assert run["tags"] == ["tiny", "prune"]
    assert "resume" not in run
    assert found.exit_code == 0
    assert found.config == {
        "seed": 7,
        "method/name": "prune",
        "ratio/ratio": 0.5,
        "finetune/phases/lm/learning_rate": 1e-4,
        "finetune/phases/lm/texts": '["a", "b"]',
    }
    assert found.summary["dense/eval/average"] == 0.75
    assert (found.summary["status"], found.summary["error"]) == ("ok", None)
    told = read_summary(folder)
    assert (told["state"], told["summary"]["dense/eval/average"]) == ("finished", 0.75)


def test_curves_in_steps_and_tokens(found: Offline) -> None:
    assert found.curve == [
        {"_step": 0, "finetune/step": 1, "finetune/tokens": 10, "finetune/lm/loss": 2.5},
        {"_step": 1, "finetune/step": 2, "finetune/tokens": 20, "finetune/lm/loss": 1.25,
         "finetune/lm/validation_loss": 1.5},
    ]  # fmt: skip
    axes = {metric.get("name"): metric for metric in found.of("metric")}
    assert axes[None]["glob_name"] == "finetune/*"
    assert axes[None]["step_metric"] == "finetune/step"
    assert {"finetune/step", "finetune/tokens"} < set(axes)


def test_tables_pictures_and_pages(folder: Path, found: Offline) -> None:
    table = json.loads(found.media("result").read_text())
    assert table["columns"] == ["a", "b", "c"]
    assert table["data"] == [[1, "x", True], [2.5, None, 1], ["all", "z", None]]
    assert found.media("plots/loss").read_bytes() == (folder / "loss.png").read_bytes()
    assert found.media("page").read_text() == "<p>page</p>"


def test_lineage(folder: Path, found: Offline) -> None:
    artifacts = found.artifacts
    assert [
        (name, one["type"], one.get("use_after_commit", False)) for name, one in artifacts.items()
    ] == [
        ("model-ab12", "model", True),
        ("profile-cd34", "profile", True),
        ("plan-of-job-1", "plan", False),
        ("checkpoint-ef56", "checkpoint", False),
    ]
    assert artifacts["model-ab12"]["metadata"]["fingerprint"] == "ab12"
    assert artifacts["model-ab12"]["contents"]["place"]["ref"] == "https://host/model"
    assert artifacts["profile-cd34"]["metadata"]["made_from"] == ["model-ab12"]
    assert artifacts["plan-of-job-1"]["metadata"]["made_from"] == ["profile-cd34"]
    plan = Path(artifacts["plan-of-job-1"]["contents"]["plan.json"]["local_path"])
    assert plan.read_text() == "{}"
    assert plan != folder / "plan.json", "a copy, which a later job does not change"
    checkpoint = artifacts["checkpoint-ef56"]
    assert checkpoint["metadata"]["place"] == str(folder / "checkpoint")
    weights = checkpoint["contents"]["place/model.safetensors"]
    assert weights["ref"] == (folder / "checkpoint" / "model.safetensors").as_uri()
    assert "local_path" not in weights
    assert "local_path" in checkpoint["contents"]["config.json"]


def test_weights_are_uploaded_on_request(tmp_path: Path) -> None:
    use(WandbTracker("offline", upload_checkpoints=True), tmp_path)
    found = read_one(tmp_path).artifacts["checkpoint-ef56"]["contents"]
    assert set(found) == {"config.json", "model.safetensors"}
    weights = tmp_path / "checkpoint" / "model.safetensors"
    assert found["model.safetensors"]["local_path"] == str(weights)


def test_identical_artifacts_of_several_jobs_are_one(tmp_path: Path, found: Offline) -> None:
    use(WandbTracker("offline"), tmp_path)
    other = read_one(tmp_path).artifacts
    shared = ("model-ab12", "profile-cd34", "plan-of-job-1")
    assert all(other[name]["digest"] == found.artifacts[name]["digest"] for name in shared)


def test_a_restarted_job_goes_on_with_its_run(tmp_path: Path) -> None:
    tracker = WandbTracker("offline")
    prepare(tmp_path)
    tracker.start(tmp_path, CONFIG, "sweep", "job", [], identity="sweep/0")
    tracker.log_curve(ROWS[1])
    tracker.finish(1)
    use(WandbTracker("offline"), tmp_path, identity="sweep/0")
    first, second = read_back(tmp_path)
    assert first.run["run_id"] == second.run["run_id"] == stable_hash("sweep/0")
    assert first.run["resume"]
    assert second.run["resume"]
    assert [row["finetune/step"] for row in first.curve] == [1]
    assert [row["finetune/step"] for row in second.curve] == [2]
    assert [row["_step"] for row in [*first.history, *second.history]] == [0, 1, 2, 3, 4]


def test_other_identities_are_other_runs(tmp_path: Path) -> None:
    for name in ("0", "1"):
        use(WandbTracker("offline"), tmp_path, identity=f"sweep/{name}")
    first, second = read_back(tmp_path)
    assert first.run["run_id"] != second.run["run_id"]
    assert first.curve == second.curve


def test_long_names_are_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = WandbTracker("offline")
    tracker.start(tmp_path, {}, "g" * 300, "n" * 300, ["t" * 65], job_type="sweep")
    tracker.artifact(Path(__file__), "a" * 300, "plan")
    tracker.finish(0)
    run = read_one(tmp_path).run
    assert [len(run[key]) for key in ("display_name", "run_group")] == [128, 128]
    assert [len(tag) for tag in run["tags"]] == [64]
    assert run["job_type"] == "sweep"
    assert not warnings(caplog)


def test_what_is_missing_costs_only_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = WandbTracker("offline")
    tracker.start(tmp_path, {}, "sweep", "job", [])
    tracker.images([tmp_path / "none.png"])
    tracker.artifact(tmp_path / "none.json", "none", "plan")
    tracker.summary({"status": "ok"})
    tracker.finish(0)
    assert ["none" in text for text in warnings(caplog)] == [True, True]
    assert read_one(tmp_path).summary["status"] == "ok"
