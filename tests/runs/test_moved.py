"""Paths of version 0.1.0 in yaml files and code of one's own: one message with the new path."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from running import ROOT, Outcome

from moe_lab.runs.moved import MODULES, NAMES, OPTIONS, PACKAGES, new_path, refusal_of_target


@pytest.mark.parametrize("path", sorted({*NAMES.values(), *MODULES.values(), *PACKAGES.values()}))
def test_every_new_path_exists(path: str) -> None:
    module, _, name = f"moe_lab.{path}".rpartition(".")
    try:
        importlib.import_module(f"moe_lab.{path}")
    except ModuleNotFoundError:
        assert hasattr(importlib.import_module(module), name)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("metrics.reap.reap", "methods.metrics.reap.reap"),
        ("ratios.uniform.Uniform", "methods.ratios.uniform.Uniform"),
        ("ratios.Budget", "methods.ratios.budget.Budget"),
        ("grouping.ream.GROUPING", "methods.grouping.ream.Ream"),
        ("grouping.ream.gated_cosine", "methods.grouping.ream.gated_cosine"),
        ("condense.experts.greedy_js.choose", "methods.condense.experts.greedy_js.choose"),
        ("methods.condense.Condense", "methods.condense.method.Condense"),
        ("finetune.Phase", "finetune.recipe.Phase"),
        ("finetune.Tuning", "finetune.tuning.Tuning"),
        ("data.StandardLibrary", "data.embedded.StandardLibrary"),
        ("data.Texts", "data.source.Source"),
        ("stages.evaluate.Suite", "evaluate.suite.Suite"),
        ("stages.measure.Measurement", "measure.speed.Measurement"),
        ("track.Tracker", "track.wandb.WandbTracker"),
        ("statistics.LayerStatistics", "profile.layer.LayerStatistics"),
        ("statistics.collect", "profile.collect.collect"),
        ("methods.prune.Prune", None),
        ("finetune.experts.Experts", None),
        ("types.Plan", "models.edits.plan.Plan"),
        ("types.Edit", "models.edits.base.Edit"),
        ("types.LayerInfo", None),
        ("editing.apply_plan", "models.edits.plan.apply_plan"),
        ("editing.prune_layer", "models.editing.prune_layer"),
        ("nothing.here", None),
    ],
)
def test_new_path(old: str, new: str | None) -> None:
    assert new_path(f"moe_lab.{old}") == (new and f"moe_lab.{new}")
    assert new_path(f"another.{old}") is None


def test_every_shipped_target_is_where_it_says() -> None:
    for path in sorted((ROOT / "conf").rglob("*.yaml")):
        for node in (OmegaConf.to_container(OmegaConf.load(path), resolve=False),):
            target = node.get("_target_") if isinstance(node, dict) else None
            assert target is None or new_path(target) is None, path


def test_a_target_that_has_moved(tmp_path: Path, job: Callable[..., Outcome]) -> None:
    outcome = job("metric._target_=moe_lab.metrics.reap.reap")
    assert outcome.code == 2 and "Traceback" not in outcome.text
    told = "_target_: moe_lab.metrics.reap.reap does not exist: it has moved, write _target_: "
    assert f"{told}moe_lab.methods.metrics.reap.reap" in outcome.text
    assert "moved" not in str(refusal_of_target("moe_lab.nothing.here"))


def test_a_tracker_that_has_moved(job: Callable[..., Outcome]) -> None:
    outcome = job("track._target_=moe_lab.track.Tracker")
    assert outcome.code == 2 and "Traceback" not in outcome.text
    assert "it has moved, write _target_: moe_lab.track.wandb.WandbTracker" in outcome.text


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_that_has_moved(option: str, job: Callable[..., Outcome]) -> None:
    told = f"{option} has moved: write {OPTIONS[option]}"
    for given in (option, f"+{option}"):
        outcome = job("method=merge", f"{given}=7")
        assert outcome.code == 2 and "Traceback" not in outcome.text
        assert told in outcome.text


def test_what_a_moved_option_is_now_can_be_given(job: Callable[..., Outcome]) -> None:
    for now in OPTIONS.values():
        given = now.replace("<value>", "ward" if "linkage" in now else "4").split()
        outcome = job("method=merge", *given)
        assert outcome.code == 0, outcome.text
        key, value = given[1].replace("grouping.", "merge/").split("=")
        assert str(outcome.report[key]) == value


def test_code_that_imports_what_has_moved(
    tmp_path: Path, job: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_metric_of_old.py").write_text(
        "from moe_lab.statistics import LayerStatistics\nfrom moe_lab.types import UserError\n"
        "def own(layer: LayerStatistics):\n    return layer['count']\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    outcome = job("metric._target_=own_metric_of_old.own")
    sys.modules.pop("own_metric_of_old", None)
    assert outcome.code == 2 and "Traceback" not in outcome.text
    assert "own_metric_of_old.py imports what has moved" in outcome.text
    old, new = "moe_lab.statistics", "moe_lab.profile.layer"
    assert (
        f"from {old} import LayerStatistics  ->  from {new} import LayerStatistics" in outcome.text
    )
    assert "UserError  ->" not in outcome.text
