"""Whole runs and sweeps of run.py on a tiny checkpoint, each in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from running import ROOT, run_command, run_python
from wandb_files import read_back, read_one

import moe_lab
from moe_lab.report.report import AROUND_STAGES, read_report
from moe_lab.runs.status import find_jobs

DEFAULT = [
    "finetune.phases.lm.data.num_samples=16",
    "finetune.phases.lm.data.max_length=32",
    "finetune.phases.lm.validation.num_samples=4",
    "finetune.phases.lm.batch_size=8",
    "eval.num_items=4",
    "eval.held_out.num_samples=4",
    "condense.padding=1",  # of so small a model a few zeros are more than one percent
    "measure.prompt_length=16",
    "measure.decode_tokens=2",
    "measure.repeats=1",
]
SWEEP = [
    "method=prune",
    "metric=random,frequency,soft_count,reap",
    "ratio.ratio=0.25,0.5",
    "finetune=none",
    "eval=perplexity",
    "calibration@eval.held_out=files",
    "eval.held_out.files=${calibration.files}",
    "eval.held_out.num_samples=4",
    "measure=none",
]
STAGES = (
    "profile plan compress finetune evaluate_dense evaluate_compressed evaluate_finetuned measure"
).split()
OF_A_VARIANT = (
    "parameters active_parameters bytes eval/average kl memory_ratio prefill_speedup "
    "decode_speedup checkpoint stock"
).split()
OF_A_RUN = (
    "status error model method metric ratio seed commit fingerprint/model fingerprint/data"
).split()


def artifacts(folder: Path) -> dict[Path, tuple[int, str]]:
    """When each finished result under outputs/store was written."""
    found = sorted((folder / "outputs" / "store").glob("*/*/artifact.json"))
    return {path: (path.stat().st_mtime_ns, path.read_text()) for path in found}


def identities(folder: Path, kind: str) -> list[dict[str, Any]]:
    files = (folder / "outputs" / "store" / kind).glob("*/artifact.json")
    return [json.loads(file.read_text())["identity"] for file in files]


def reports(folder: Path) -> dict[str, dict[str, Any]]:
    """Of the last sweep under `folder`, by job number."""
    sweep = sorted((folder / "outputs" / "runs").iterdir())[-1]
    return {path.parent.name: json.loads(path.read_text()) for path in sweep.glob("*/report.json")}


@dataclass(frozen=True)
class Run:
    """A finished run: its working folder, its run folder, its report, what it printed."""

    home: Path
    folder: Path
    report: dict[str, Any]
    done: subprocess.CompletedProcess[str]

    def checkpoint(self, variant: str) -> Path:
        """Where a variant lies; reports name it as the store was named, here relative to home."""
        return self.home / self.report[f"{variant}/checkpoint"]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, small: list[str]) -> Run:
    """The default run, in small: condensed, fine-tuned, evaluated, measured, tracked offline."""
    home = tmp_path_factory.mktemp("first")
    done = run_command(home, *small, *DEFAULT, "track=offline", "run_dir=run")
    assert done.returncode == 0, done.stdout + done.stderr
    return Run(home, home / "run", json.loads((home / "run" / "report.json").read_text()), done)


def test_the_report_has_the_contracts_keys(first: Run) -> None:
    report = first.report
    assert [key for key in OF_A_RUN if key not in report] == []
    assert (report["status"], report["error"], report["method"]) == ("ok", None, "condense")
    for variant in ("dense", "compressed", "finetuned"):
        assert [key for key in OF_A_VARIANT if report.get(f"{variant}/{key}") is None] == []
        assert 0 <= report[f"{variant}/eval/tiny_prose/acc"] <= 1
        assert report[f"{variant}/eval/tiny_perplexity_code/bits_per_byte"] > 0
        assert report[f"{variant}/stock"] is True
        assert (first.checkpoint(variant) / "config.json").is_file()
    for stage in STAGES:
        assert report[f"seconds/{stage}"] >= 0
        assert report[f"cached/{stage}"] is False
    assert report["dense/kl"] == 0 < report["compressed/kl"]
    assert report["dense/memory_ratio"] == 1
    assert report["compressed/parameters"] < report["dense/parameters"]


def test_a_run_leaves_its_files_and_says_where(first: Run) -> None:
    plan = json.loads((first.folder / "plan.json").read_text())
    assert [layer["index"] for layer in plan["layers"]] == [1, 2, 3]
    condensed = [layer for layer in plan["layers"] if layer["edit"] == "condense"]
    assert [layer["index"] for layer in condensed] == plan["layer_order"]
    assert len(condensed[0]["experts"]) == 2
    assert (first.folder / ".hydra" / "config.yaml").is_file()
    assert list((first.folder / "wandb").glob("offline-run-*"))
    shown = first.done.stdout
    for word in ("dense", "compressed", "finetuned", "tiny_prose", "KL", "prefill"):
        assert word in shown
    assert first.report["finetuned/checkpoint"] in shown.replace("\n", "")
    assert "Traceback" not in shown + first.done.stderr
    for variant in ("compressed", "finetuned"):
        card = (first.checkpoint(variant) / "README.md").read_text()
        assert "condense" in card and first.report["fingerprint/model"] in card


def test_a_second_run_computes_nothing(first: Run, small: list[str]) -> None:
    before = artifacts(first.home)
    done = run_command(first.home, *small, *DEFAULT, "track=off", "run_dir=again")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((first.home / "again" / "report.json").read_text())
    assert all(report[f"cached/{stage}"] is True for stage in STAGES)
    own = ("cached/", "sweep", "job", "run_id", *(f"seconds/{part}" for part in AROUND_STAGES))
    assert {key: value for key, value in report.items() if not key.startswith(own)} == {
        key: value for key, value in first.report.items() if not key.startswith(own)
    }
    assert artifacts(first.home) == before


FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
with torch.no_grad():
    logits = model(torch.arange(3, 43).reshape(2, 20)).logits
assert "moe_lab" not in sys.modules
torch.save(logits, sys.argv[2])
"""


@pytest.mark.parametrize("variant", ["compressed", "finetuned"])
def test_stock_transformers_loads_it(first: Run, variant: str, tmp_path: Path) -> None:
    folder, saved = first.checkpoint(variant), tmp_path / "logits.pt"
    subprocess.run([sys.executable, "-c", FRESH, folder, str(saved)], check=True, cwd=tmp_path)
    model = moe_lab.load(folder, dtype="float32")
    assert model.config.mlp_only_layers != [0], "one more layer is dense"
    with torch.no_grad():
        ours = model(torch.arange(3, 43).reshape(2, 20)).logits
    assert torch.equal(torch.load(saved), ours)


def test_one_failed_job_spoils_no_sweep_and_a_second_compression_works(
    first: Run, small: list[str]
) -> None:
    """On the condensed checkpoint: no method, a second compression, and a ratio out of reach."""
    compressed = first.checkpoint("compressed")
    jobs = ["method=none,prune", "ratio.ratio=0.25,0.99", f"model.path={compressed}"]
    stages = ["eval=none", "measure=none", "finetune.phases.lm.data.num_samples=8"]
    done = run_command(first.home, "-m", *small, *DEFAULT[1:4], *stages, *jobs)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    found = reports(first.home)
    status = {job: report["status"] for job, report in found.items()}
    assert status == {"0": "ok", "1": "ok", "2": "ok", "3": "failed"}
    assert "ratio.ratio=0.99 is too much" in found["3"]["error"]
    assert "top-k" in found["3"]["error"]
    assert "compressed/checkpoint" not in found["0"]
    assert found["2"]["finetuned/stock"] is True
    twice = moe_lab.load(first.home / found["2"]["finetuned/checkpoint"])
    assert twice.config.num_experts == 6
    assert len(twice.config.mlp_only_layers) == 2


def start(folder: Path, *overrides: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "run.py"), *overrides]
    with (folder / "log").open("w") as log:
        return subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)


def test_a_killed_sweep_goes_on_where_it_was(tmp_path: Path, small: list[str]) -> None:
    process = start(tmp_path, "-m", *small, *SWEEP)
    finished = tmp_path / "outputs" / "store" / "compress"
    until = time.monotonic() + 300
    while len(list(finished.glob("*/artifact.json"))) < 3 and time.monotonic() < until:
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = artifacts(tmp_path)
    assert 3 <= len(identities(tmp_path, "compress")) < 8, "killed in the middle"

    done = run_command(tmp_path, "-m", *small, *SWEEP)
    assert done.returncode == 0, done.stdout + done.stderr
    after = artifacts(tmp_path)
    assert {path: after[path] for path in before} == before, "finished work was not repeated"

    found = reports(tmp_path)
    assert {report["status"] for report in found.values()} == {"ok"}
    pairs = {(report["metric"], report["ratio"]) for report in found.values()}
    metrics = ("random", "frequency", "soft_count", "reap")
    assert pairs == {(metric, ratio) for metric in metrics for ratio in (0.25, 0.5)}
    assert len(identities(tmp_path, "profile")) == 1
    assert len(identities(tmp_path, "compress")) == 8
    evaluated = identities(tmp_path, "evaluate")
    assert len([one for one in evaluated if one["checkpoint"] == one["dense"]]) == 1
    assert len(evaluated) == 9
    assert len({report["dense/eval/held_out/perplexity"] for report in found.values()}) == 1


def test_help_is_light() -> None:
    done = run_command(ROOT, "--help", python=("-X", "importtime"))
    assert done.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "hydra" in imported
    assert not imported & {"torch", "transformers", "datasets", "wandb", "lm_eval", "numpy"}
    groups = "model calibration metric ratio condense method finetune eval measure compute track"
    assert [group for group in groups.split() if f"{group}: " not in done.stdout] == []
    assert "ratio.ratio" in done.stdout and "run_dir" in done.stdout


def test_whoever_reads_the_help_may_stop_reading() -> None:
    command = [sys.executable, str(ROOT / "run.py"), "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        told = process.stderr.read().decode()
    assert (process.returncode, told) == (0, "")


# --------------------------------------------------------------------------- sweeps and their ends


OWN_METRIC = """
from moe_lab.profile.layer import LayerStatistics


def certainty(layer: LayerStatistics):
    return layer.mean("{name}")
"""
WITH_OWN_METRIC = [
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


def reports_of(folder: Path) -> list[dict[str, Any]]:
    return [read_report(one) for one in sorted(folder.glob("[0-9]*"))]


def changed(folder: Path) -> list[int]:
    return [path.stat().st_mtime_ns for path in sorted(folder.glob("[0-9]*/report.json"))]


def test_two_jobs_fail_and_only_they_are_run_again(
    tmp_path: Path, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A metric of one's own has a mistake: a table with holes, then without, one page each time."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    write_metric(tmp_path, "gate_sums")
    base = [option for option in small if option != "track=off"]
    done = run_command(tmp_path, "--config-dir", "research_conf", "-m", *base, *WITH_OWN_METRIC)
    text = done.stdout + done.stderr
    assert done.returncode == 2, text
    folder = tmp_path / "outputs" / "runs" / "mine"
    found = reports_of(folder)
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
    assert [one["status"] for one in reports_of(folder)] == ["ok"] * 4
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
