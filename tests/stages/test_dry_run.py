"""Dry runs, as whole jobs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from real_models import REAL
from running import Job, Outcome
from sparse_files import write_sparse

from moe_lab.models import checkpoint as checkpoints

GIB = 2**30
STAGES = ("profile", "plan", "compress")


def told(outcome: Outcome) -> dict:
    place = outcome.text.rpartition("dry run: ")[2].split("\n")[0].strip()
    return json.loads(Path(place).read_text())


def test_nothing_is_made_and_no_weight_is_read(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        pytest.fail("weights were read")

    monkeypatch.setattr(checkpoints, "load", refused)
    done = job("dry_run=true", "eval=perplexity", "eval.held_out.max_length=32")
    assert done.code == 0, done.text
    assert not done.report and not done.store.exists()
    figures = told(done)
    assert figures["refused"] is None
    assert [figures[f"{stage}/cached"] for stage in (*STAGES, "evaluate_dense")] == [
        False, None, None, False,
    ]  # fmt: skip
    assert figures["profile/flops"] > 0 and figures["memory_gib"] > figures["process_gib"] > 0


def test_what_is_there_is_said_and_costs_nothing(job: Job) -> None:
    job()
    figures = told(job("dry_run=true"))
    assert all(figures[f"{stage}/cached"] is True for stage in STAGES)
    assert figures["hours"] == figures["disk_gib"] == 0
    other = told(job("dry_run=true", "ratio.ratio=0.5", "eval=perplexity"))
    assert [other[f"{stage}/cached"] for stage in STAGES] == [True, False, None]
    assert other["hours"] > 0


def test_a_dry_run_is_no_finished_run(job: Job) -> None:
    assert job("dry_run=true").code == 0
    done = job("resume=true", anew=False)
    assert done.report["status"] == "ok" and done.report["compressed/checkpoint"]
    after = job("dry_run=true", anew=False)
    assert after.report == done.report


def test_what_does_not_fit_is_refused_with_what_helps(job: Job) -> None:
    done = job("dry_run=true", "compute.card=l4", "measure=speed", "measure.batch_size=3000000")
    assert done.code == 2
    assert "NVIDIA L4 has 24 GiB of memory, and measure needs" in done.text
    assert "(measure=none)" in done.text
    assert told(done)["refused"]


def test_a_mistake_is_refused_as_in_a_run(job: Job) -> None:
    done = job("dry_run=true", "method=prune", "ratio.ratio=0.9")
    assert (done.code == 2 and "removes" in done.text) or "top-k" in done.text


def test_a_disk_without_room_is_refused_before_any_work(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moe_lab.stages import pipeline

    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(pipeline.shutil, "disk_usage", lambda _: usage)
    done = job()
    assert done.code == 2
    assert "this run needs about" in done.text and "store=<folder>" in done.text
    assert not list(done.store.glob("profile/*/*.json"))


@pytest.mark.parametrize("name", REAL)
def test_every_model_of_the_hub(name: str, job: Job, tmp_path: Path) -> None:
    """By a config and headers before holes: as large as the real one, in no room."""
    size = write_sparse(REAL[name]["architecture"], tmp_path / "model")
    disk = sum(file.stat().st_blocks for file in (tmp_path / "model").iterdir()) * 512
    assert disk < 2**21 < size
    done = job(
        "dry_run=true", "compute.card=h200", f"model={name}", f"model.path={tmp_path / 'model'}",
        "model.dtype=bfloat16",
    )  # fmt: skip
    figures = told(done)
    assert figures["dense/gib"] == pytest.approx(size / GIB, rel=0.01)
    assert 0.5 * figures["dense/gib"] < figures["result/gib"] < figures["dense/gib"]
    whole = figures["dense/gib"]
    assert figures["profile/memory_gib"] < (whole if whole > 70 else 1.5 * whole)
