"""A sweep from its start to its table: what it leaves, what fails, and doing the rest again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from running import ROOT, run_command, run_python
from wandb_files import read_back, read_one

from moe_lab.report.report import read_report
from moe_lab.runs.status import find_jobs

OWN_METRIC = """
from moe_lab.profile.layer import LayerStatistics


def certainty(layer: LayerStatistics):
    return layer.mean("{name}")
"""
QUICK = [
    "method=prune",
    "metric=random,mine",
    "ratio.ratio=0.25,0.5",
    "finetune=none",
    "eval=perplexity",
    "calibration@eval.held_out=files",
    "eval.held_out.files=${calibration.files}",
    "eval.held_out.num_samples=4",
    "measure=none",
    "hydra.sweep.dir=outputs/runs/mine",
]


def write_metric(home: Path, name: str) -> None:
    (home / "research").mkdir(exist_ok=True)
    (home / "research" / "mine.py").write_text(OWN_METRIC.format(name=name))
    conf = home / "research_conf" / "metric"
    conf.mkdir(parents=True, exist_ok=True)
    (conf / "mine.yaml").write_text("_target_: research.mine.certainty\n_partial_: true\n")


def reports(folder: Path) -> list[dict[str, Any]]:
    return [read_report(one) for one in sorted(folder.glob("[0-9]*"))]


def changed(folder: Path) -> list[int]:
    return [path.stat().st_mtime_ns for path in sorted(folder.glob("[0-9]*/report.json"))]


def test_two_jobs_fail_and_only_they_are_run_again(
    tmp_path: Path, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A metric of one's own has a mistake: a table with holes, then without, one page each time."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    write_metric(tmp_path, "gate_sums")
    base = [option for option in small if option != "track=off"]
    done = run_command(tmp_path, "--config-dir", "research_conf", "-m", *base, *QUICK)
    text = done.stdout + done.stderr
    assert done.returncode == 2, text
    folder = tmp_path / "outputs" / "runs" / "mine"
    found = reports(folder)
    assert [one["status"] for one in found] == ["ok"] * 2 + ["failed"] * 2
    assert "gate_sums" in found[2]["error"]
    for name in ("table.md", "table.csv", "table.tex", "index.html"):
        assert (folder / name).stat().st_size > 50, name
    assert (folder / "plots" / "by_ratio.pdf").is_file()
    assert {"usage.csv", "plots", "plan.json"} <= {path.name for path in (folder / "0").iterdir()}
    table = (folder / "table.md").read_text()
    assert table.count("| failed |") >= 2 and table.count("- failed: metric=mine") == 2
    assert "gate_sums" in table
    assert "job 2 [3/4]: metric=mine ratio.ratio=0.25" in text
    assert "job 3 [4/4]: failed in" in text and "4 jobs: 2 ok, 2 failed; " in text
    assert "HYDRA" not in text

    before, numbers = changed(folder), {path.name for path in folder.iterdir()}
    write_metric(tmp_path, "gate_sum")
    again = run_python(tmp_path, "-m", "moe_lab.runs", str(folder), "--rerun")
    assert again.returncode == 0, again.stdout + again.stderr
    same = [now == then for now, then in zip(changed(folder), before, strict=True)]
    assert same == [True] * 2 + [False] * 2, "only those two"
    assert again.stdout.count(": done before") == 2
    assert {path.name for path in folder.iterdir()} == numbers
    assert [one["status"] for one in reports(folder)] == ["ok"] * 4
    assert "failed" not in (folder / "table.md").read_text()
    _check_tracked(folder)


def _check_tracked(folder: Path) -> None:
    """What the jobs and the sweep left for W&B, as its own reader finds it."""
    one, said = read_one(folder / "0"), read_report(folder / "0")
    assert (one.run["display_name"], one.run["run_group"]) == (
        "metric=random ratio.ratio=0.25", "mine",
    )  # fmt: skip
    assert {"prune", "random"} <= set(one.run["tags"])
    assert one.config["ratio"] == 0.25 and one.config["calibration/max_length"] == 32
    assert one.config["eval/held_out/num_samples"] == 4, "the composed config, flat"
    kept = {key: value for key, value in said.items() if value is not None}
    assert {key: one.summary.get(key) for key in kept} == kept
    assert json.loads(one.media("result").read_text())["columns"] == [
        "figure", "dense", "compressed",
    ]  # fmt: skip
    assert one.media("plots/kept").read_bytes() == (folder / "0/plots/kept.png").read_bytes()
    names = {kind: said[f"artifact/{kind}"].replace("/", "-") for kind in
             ("profile", "plan", "compress")}  # fmt: skip
    chain = one.artifacts
    assert list(chain) == [f"model-{said['fingerprint/model']}", *names.values()]
    assert names["plan"] in chain[names["compress"]]["metadata"]["made_from"]
    first, whole = read_back(folder)
    assert first.run["run_id"] == whole.run["run_id"], "the second end goes on with the first"
    assert (whole.run["run_group"], whole.run["job_type"]) == ("mine", "sweep")
    assert len(json.loads(whole.media("reports").read_text())["data"]) == 4
    assert b"<!DOCTYPE html>" in whole.media("page").read_bytes()


def test_a_killed_job_says_so_and_is_run_again(tmp_path: Path, small: list[str]) -> None:
    """Killed in its first stages: the report says running, its lock is free; then it goes on."""
    options = [*small, "method=prune", "ratio.ratio=0.25,0.5", "finetune=none", "eval=none"]
    options += ["measure=none", "hydra.sweep.dir=runs/killed"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), "-m", *options],
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    first = tmp_path / "runs" / "killed" / "0" / "report.json"
    until = time.monotonic() + 300
    while not first.is_file() and time.monotonic() < until:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    folder = first.parents[1]
    assert read_report(first.parent)["status"] == "running"
    assert [one.status for one in find_jobs(folder)] == ["killed", "missing"]
    assert read_report(first.parent)["ratio"] == 0.25, "it tells what was asked for"
    again = run_python(tmp_path, "-m", "moe_lab.runs", str(folder), "--rerun")
    assert again.returncode == 0, again.stdout + again.stderr
    assert [one.status for one in find_jobs(folder)] == ["ok", "ok"]
