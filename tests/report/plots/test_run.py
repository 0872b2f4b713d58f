"""Pictures of one run: which, and the same bytes everywhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from pictured_runs import PLANS, UNEVEN, names, save_curve, save_report, save_usage, scored

from moe_lab.models.edits.keep import KeepLayer
from moe_lab.models.edits.merge import MergeExperts
from moe_lab.models.edits.plan import Plan
from moe_lab.report.frame import read_reports
from moe_lab.report.plots.run import draw_run
from moe_lab.report.plots.sweep import draw_sweep


def test_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    assert draw_run(tmp_path / "0") == []
    save_report(tmp_path / "0", status="failed", error="x")
    assert draw_run(tmp_path / "0") == []
    assert draw_sweep(tmp_path, read_reports(tmp_path)) == []
    save_report(tmp_path / "0", **{"compressed/eval/average": None})
    save_report(tmp_path / "1", seed=1)
    assert draw_sweep(tmp_path, read_reports(tmp_path)) == []
    kept = Plan((KeepLayer(0, "x"),))
    (tmp_path / "0" / "plan.json").write_text(kept.to_text())
    (tmp_path / "0" / "curve.jsonl").write_text("")
    assert draw_run(tmp_path / "0") == []
    assert not list(tmp_path.rglob("plots"))


def test_pictures_of_a_run_with_everything(tmp_path: Path) -> None:
    save_report(tmp_path, metric="reap")
    save_usage(tmp_path, UNEVEN)
    save_curve(tmp_path, ("lm", "sft"), entropy=1.0, top_k=2)
    (tmp_path / "plan.json").write_text(scored(MergeExperts, UNEVEN).to_text())
    assert names(draw_run(tmp_path)) == ["usage", "scores", "kept", "curves"]


def test_same_input_same_bytes_in_any_process(tmp_path: Path) -> None:
    for name in "ab":
        save_report(tmp_path / name, metric="reap")
        save_usage(tmp_path / name, UNEVEN)
        (tmp_path / name / "plan.json").write_text(PLANS["merge"][0].to_text())
    draw_run(tmp_path / "a")
    script = "import sys, pathlib; from moe_lab.report.plots.run import draw_run; " \
             "draw_run(pathlib.Path(sys.argv[1]))"  # fmt: skip
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", script, tmp_path / "b"], env=environment, check=True)
    one, other = (
        {path.name: path.read_bytes() for path in (tmp_path / name / "plots").iterdir()}
        for name in "ab"
    )
    assert len(one) == 6 and one == other
