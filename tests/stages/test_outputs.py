"""What stages leave behind, brought into a run's folder and its report."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from families import tiny_batch, tiny_model

from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.edits.keep import KeepLayer
from moe_lab.models.edits.plan import Plan
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.models.layers import num_parameters
from moe_lab.profile.collect import collect_statistics, save_statistics
from moe_lab.report.report import read_report
from moe_lab.stages.outputs import RunReport, copy_plan, write_usage
from moe_lab.store import Artifact, Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def planned(store: Store, plan: Plan, *groups: Plan) -> Artifact:
    def make(folder: Path) -> None:
        (folder / "plan.json").write_text(plan.to_text())
        for number, group in enumerate(groups):
            (folder / "plans").mkdir(exist_ok=True)
            (folder / "plans" / f"{number}.json").write_text(group.to_text())

    return store.get("plan", {"plan": plan.to_text()}, make)


def test_usage_is_1_where_all_are_used_alike(store: Store, run: Path) -> None:
    statistics = collect_statistics(tiny_model("qwen2_moe"), [tiny_batch()])
    profiled = store.get("profile", {"a": 1}, lambda folder: save_statistics(statistics, folder))
    write_usage(profiled, run)
    found = pd.read_csv(run / "usage.csv").set_index("layer")
    assert list(found.columns) == ["expert", "tokens", "usage"]
    for layer in statistics:
        rows = found.loc[layer.info.index]
        assert rows["tokens"].tolist() == layer["count"].tolist()
        assert rows["tokens"].sum() == 3 * layer["tokens"], "top-3"
        expected = rows["tokens"] / rows["tokens"].mean()
        assert rows["usage"].tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_a_plan_of_groups_changes_no_checkpoint(store: Store, run: Path) -> None:
    prune = Plan((PruneExperts(1, "model.layers.1.mlp", kept=(0, 1, 2, 3)),))
    found: dict[str, object] = {}
    assert copy_plan(planned(store, prune), run, found) and found == {}
    common = Plan((KeepLayer(1, "model.layers.1.mlp"),), notes={"statistics": "intact model"})
    assert not copy_plan(planned(store, common, prune), run, found)
    assert found == {"statistics": "intact model"}
    assert Plan.load(run / "plan.json") == common
    assert Plan.load(run / "plans" / "0.json") == prune


def test_parameters_of_groups_are_their_mean(store: Store, run: Path, tmp_path: Path) -> None:
    model = tiny_model("qwen2_moe")
    model.save_pretrained(tmp_path / "dense")
    groups = [Plan((PruneExperts(1, "model.layers.1.mlp", kept=tuple(range(kept))),))
              for kept in (4, 6)]  # fmt: skip
    report = RunReport({}, run)
    report.add_groups(planned(store, Plan(()), *groups), Checkpoint(tmp_path / "dense"))
    expert = 3 * 32 * 16 + 32  # and its router row
    expected = num_parameters(model) - 3 * expert
    assert report.report["compressed/parameters"] == expected
    assert report.report["compressed/parameter_ratio"] == expected / num_parameters(model)


def test_the_report_is_on_disk_after_each_stage(store: Store, run: Path) -> None:
    report = RunReport({"status": "running"}, run)
    made = store.get("profile", {"a": 1}, lambda folder: None)
    assert report.add_stage("profile", made) is made
    told = read_report(run)
    assert (told["status"], told["cached/profile"]) == ("running", False)
    assert told["artifact/profile"] == f"profile/{made.key}"
    report.add_stage("profile", store.get("profile", {"a": 1}, lambda folder: None))
    assert read_report(run)["cached/profile"] is True
    assert read_report(run)["seconds/profile"] == told["seconds/profile"], "when it was made"


def test_the_entropy_of_repeated_experts_is_not_told(run: Path, tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path / "result" / "checkpoint")
    form = {"stock": True, "repeated_parameters": 5}
    (tmp_path / "result" / "form.json").write_text(json.dumps(form))
    checkpoint = Checkpoint(tmp_path / "result" / "checkpoint")
    report = RunReport({}, run)
    report.add_checkpoints({"compressed": checkpoint})
    for name in ("dense", "compressed", "compressed_top_1"):
        report.add_evaluation(name, {"routing/entropy": 1.0, "kl": 0.5, "average": 0.7})
    told = {key for key in report.report if "entropy" in key}
    assert told == {"dense/eval/routing/entropy"}
    assert report.report["compressed_top_1/kl"] == 0.5
    assert report.report["compressed/eval/average"] == 0.7
    assert report.report["compressed/stock"] is True
