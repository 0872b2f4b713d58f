"""What one run's stages take from each other, and what its report says on the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from families import tiny_model

from moe_lab.compute import Compute
from moe_lab.data.tokens import Tokens
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.report.report import read_report
from moe_lab.report.serving import where_it_runs
from moe_lab.stages.context import Context
from moe_lab.stages.run import Run
from moe_lab.store import Store
from moe_lab.types import NotFinite


@pytest.fixture
def run(tmp_path: Path) -> Run:
    (tmp_path / "run").mkdir()
    context = Context(Store(tmp_path / "store"), Compute("cpu"))
    text = Tokens(((1, 2),), pad_id=0)
    parts = None  # nothing here asks what was asked for
    return Run({}, parts, context, tmp_path / "run", {"status": "running"}, {"calibration": text})


def test_the_report_is_on_disk_after_each_result(run: Run) -> None:
    store = run.context.store
    made = store.get("profile", {"a": 1}, lambda folder: None)
    run.add_result("profile", made)
    assert run.results == {"profile": made}
    told = read_report(run.folder)
    assert (told["status"], told["cached/profile"]) == ("running", False)
    assert told["artifact/profile"] == f"profile/{made.key}"
    run.add_result("profile", store.get("profile", {"a": 1}, lambda folder: None))
    assert read_report(run.folder)["cached/profile"] is True
    assert read_report(run.folder)["seconds/profile"] == told["seconds/profile"], "when it was made"


def test_a_variant_says_where_it_lies_and_in_which_form(run: Run, tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path / "result" / "checkpoint")
    dense = Checkpoint(tmp_path / "result" / "checkpoint")
    run.add_variant("dense", dense)
    assert run.report["dense/checkpoint"] == str(dense.path) and run.report["dense/stock"] is True
    assert run.compressed == run.dense == dense, "until something is compressed"
    form = {"stock": False, "repeated_parameters": 5}
    (tmp_path / "result" / "form.json").write_text(json.dumps(form))
    run.add_variant("compressed", dense)
    assert run.report["compressed/stock"] is False
    assert run.report["compressed/repeated_parameters"] == 5
    fewer = tmp_path / "fewer" / "checkpoint"
    tiny_model("mixtral", num_local_experts=4).save_pretrained(fewer)
    run.add_variant("finetuned", Checkpoint(fewer))
    assert (run.report["dense/family"], run.report["dense/form"]) == ("mixtral", "native")
    assert run.report["finetuned/form"] == "native, fewer experts"
    lines = where_it_runs("mixtral", "native, fewer experts").lines()
    assert run.report["finetuned/serving"] == "; ".join(lines.values())
    assert "dense/repeated_parameters" not in run.report


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_figure_that_is_no_number_ends_the_run(run: Run, value: float) -> None:
    run.report |= {"dense/kl": 0.0, "diagnosis/gate_entropy": None, "dense/eval/a/acc": value}
    with pytest.raises(NotFinite, match="evaluate_dense: the figure dense/eval/a/acc is"):
        run.check_figures("evaluate_dense")
    assert "dense/eval/a/acc" not in run.report, "the report that is written has none"
    run.check_figures("evaluate_dense")
