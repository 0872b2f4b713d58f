"""What a report says of what was asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from running import Outcome

from moe_lab.models.edits.drop_layer import DropLayer
from moe_lab.models.edits.keep import KeepLayer
from moe_lab.models.edits.plan import Plan
from moe_lab.option import Plugin
from moe_lab.runs.settings import Description, planned_layers, report_head, tags_of


@pytest.fixture
def asked(composed: Callable[..., Any], tmp_path: Path) -> Callable[..., Description]:
    """A job that was asked for with these overrides."""

    def describe(*overrides: str) -> Description:
        config = composed(*overrides)
        choices = dict(config.hydra.runtime.choices)
        plain = {key: OmegaConf.to_container(config[key], resolve=True)
                 if OmegaConf.is_config(config[key]) else config[key]
                 for key in config if key != "hydra"}  # fmt: skip
        return Description(tmp_path, "sweep", "job", choices, plain)

    return describe


def test_a_request_is_all_that_decides_a_result(asked: Callable[..., Description]) -> None:
    def request(*overrides: str) -> str:
        return report_head(asked("method=prune", *overrides))["fingerprint/request"]

    plain = request()
    assert request("store=x", "run_dir=x", "compute.batch_size=3", "track=off") == plain
    assert request("+model.licence=MIT", "+model.architecture.model_type=mixtral") == plain
    others = [request(one) for one in ("seed=1", "ratio.ratio=0.5", "calibration.num_samples=9")]
    assert len({plain, *others}) == 4


def test_tags_name_what_was_chosen(asked: Callable[..., Description]) -> None:
    pruned = asked("model=tiny_mixtral", "method=prune", "metric=reap", "finetune=none")
    assert tags_of(pruned) == ["tiny_mixtral", "prune", "reap"]
    condensed = asked("model=tiny_deepseek", "method=condense", "metric=reap", "finetune=experts")
    assert tags_of(condensed) == ["tiny_deepseek", "condense", "experts"]


def test_one_key_says_how_many_layers_whatever_the_method(
    asked: Callable[..., Description],
) -> None:
    for method in ("condense", "drop_layers", "merge"):
        given = [f"method={method}", "condense.num_layers=3"]
        given += ["method.layers=last"] if method == "merge" else []
        head = report_head(asked(*given))
        assert head["condense/num_layers"] == 3, method
        assert f"{method}/num_layers" not in {*head} - {"condense/num_layers"}
    assert "condense/num_layers" not in report_head(asked("method=merge", "method.layers=all"))


def test_a_report_tells_a_recipe_s_own_options(asked: Callable[..., Description]) -> None:
    head = report_head(asked("finetune=expert_dropping", "finetune.force=null"))
    own = {key: value for key, value in head.items() if key.startswith("finetune/")}
    assert own == {"finetune/trains": "both", "finetune/windows": 8, "finetune/beta": 0.8,
                   "finetune/force": None}  # fmt: skip


class OwnMethod(Plugin):
    """A method that says which groups belong to it, and calls an option as others do."""

    @classmethod
    def settings(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        return {"share": options["share"], "condense/num_layers": 2}

    @classmethod
    def groups(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        return ("metric",) if options["share"] else ()


def test_a_method_says_its_settings_and_its_groups(asked: Callable[..., Description]) -> None:
    job = asked("metric=reap")
    job.choices["method"] = "mine"
    job.config["method"] = {"_target_": f"{__name__}.OwnMethod", "share": 0.5, "more": 1}
    head = report_head(job)
    assert (head["mine/share"], head["condense/num_layers"]) == (0.5, 2)
    assert (head["metric"], head["ratio"]) == ("reap", None)
    assert "mine/more" not in head and "ratio_method" not in head
    assert "reap" in tags_of(job)
    job.config["method"]["share"] = 0
    assert report_head(job)["metric"] is None and "reap" not in tags_of(job)


def test_what_does_not_exist_is_told_as_it_was_asked_for(asked: Callable[..., Description]) -> None:
    job = asked("calibration=stdlib", "finetune=seer")
    job.config["finetune"]["_target_"] = "no.such.Recipe"
    head = report_head(job)
    assert (head["finetune/entropy"], head["finetune/dtype"]) == (0.1, "float32")


def test_layers_come_in_their_order_of_choice(tmp_path: Path) -> None:
    assert planned_layers(tmp_path) == {}
    edits = (DropLayer(1, "a"), KeepLayer(2, "b"), DropLayer(4, "c"))
    for order, told in (((4, 1), "[4, 1]"), ((), "[1, 4]")):
        (tmp_path / "plan.json").write_text(Plan(edits, layer_order=order).to_text())
        assert planned_layers(tmp_path) == {"plan/layers": told}


def test_jobs_of_a_sweep_can_be_told_apart(job: Callable[..., Outcome]) -> None:
    """What a sweep is over stands in each report, also of a job that is refused."""
    wrong = ["calibration.group_by=domain", "calibration.group=code", "calibration.pack=true"]
    report = job("ratio=coverage", "ratio.coverage=0.8", "ratio.floor=4", *wrong).report
    assert report["status"] == "failed" and report["ratio_method"] == "coverage"
    assert (report["ratio/coverage"], report["ratio/floor"]) == (0.8, 4)
    assert (report["calibration/group_by"], report["calibration/group"]) == ("domain", "code")
