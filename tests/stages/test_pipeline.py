"""The pipeline as a whole: its stages, and what their keys depend on."""

from __future__ import annotations

import ast
import functools
import json
from collections.abc import Callable
from typing import Any

import pytest
from running import Outcome

from moe_lab import dependencies
from moe_lab.dependencies import code_version, modules_of
from moe_lab.evaluate.decoding.greedy import Greedy
from moe_lab.methods.metrics.reap import reap
from moe_lab.methods.prune import Prune
from moe_lab.methods.ratios.uniform import Uniform
from moe_lab.models.edits.keep import KeepLayer
from moe_lab.models.edits.merge import MergeExperts
from moe_lab.models.edits.plan import Plan
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.stages.pipeline import STAGES, stage_named

MAKERS = {name: stage_named(name).make for name in STAGES}
EACH_STAGE = pytest.mark.parametrize("name", MAKERS)
# For people: how a run is told, never what it found. Of a diagnosis, pictures are the result.
PRESENTATION = ("report", "tables", "track", "runs", "progress")


@pytest.fixture
def rewritten(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[[str], str]], None]:
    """Lets a module's text be another one, for all that looks at it."""
    source_of = dependencies.source_of

    def rewrite(changed: str, change: Callable[[str], str]) -> None:
        text = change(source_of(changed))
        monkeypatch.setattr(
            dependencies, "source_of", lambda name: text if name == changed else source_of(name)
        )

    return rewrite


def with_words(source: str) -> str:
    """The same code: a comment, other blank lines, and another docstring in each function."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
            told = [ast.Expr(ast.Constant("Other words."))]
            has = ast.get_docstring(node, clean=False) is not None
            node.body[: int(has)] = told
    return "# a comment\n\n" + ast.unparse(ast.fix_missing_locations(tree))


def test_a_ratio_of_zero_changes_nothing(job: Callable[..., Outcome]) -> None:
    outcome = job("ratio.ratio=0", "eval=none")
    assert outcome.code == 0, outcome.text


@EACH_STAGE
def test_a_constant_in_any_module_that_a_stage_reaches_changes_its_key(
    name: str, rewritten: Callable[..., None]
) -> None:
    maker = MAKERS[name]
    before, reached = code_version(maker), modules_of(maker)
    assert f"moe_lab.stages.{name}" in reached and len(reached) > 5
    for module in sorted(reached):
        rewritten(module, lambda source: source + "\nCHANGED = 1\n")
        assert code_version(maker) != before, module


@EACH_STAGE
def test_words_change_no_key(name: str, rewritten: Callable[..., None]) -> None:
    maker = MAKERS[name]
    before = code_version(maker)
    for module in sorted(modules_of(maker)):
        rewritten(module, with_words)
        assert code_version(maker) == before, module


@EACH_STAGE
def test_presentation_enters_no_key(name: str) -> None:
    told = {one.split(".")[1] for one in modules_of(MAKERS[name])} & set(PRESENTATION)
    assert told == ({"report"} if name == "diagnose" else set())


def test_what_was_forgotten_in_lists_by_hand_is_reached() -> None:
    for stage, modules in {
        "evaluate": ("profile.layer", "models.routers", "evaluate.tasks.tiny.items"),
        "measure": ("measure.speed", "models.layers", "models.routers", "models.remapped"),
        "profile": ("models.layerwise", "models.stream", "models.activations", "data.tokens"),
        "compress": ("models.forms", "models.own_form", "models.edits.plan"),
        "finetune": ("finetune.training", "finetune.tuning", "models.streamed"),
    }.items():
        assert {f"moe_lab.{one}" for one in modules} <= modules_of(MAKERS[stage])


@pytest.mark.parametrize("name", ["profile", "plan", "diagnose", "teach", "evaluate", "measure"])
def test_what_builds_our_own_form_is_reached_by_all_that_load(name: str) -> None:
    built = {"moe_lab.models.own_form", "moe_lab.models.editing"}
    assert built <= modules_of(MAKERS[name])


def test_stages_do_not_depend_on_each_other_or_on_the_run() -> None:
    for name, maker in MAKERS.items():
        others = {f"moe_lab.stages.{other}" for other in (*MAKERS, "run", "pipeline", "parts")}
        allowed = {f"moe_lab.stages.{name}"}
        allowed |= {"moe_lab.stages.evaluate"} if name == "evaluate_groups" else set()
        assert modules_of(maker) & others == allowed


def test_a_plan_depends_on_its_own_metric_and_ratio_alone() -> None:
    method = Prune(functools.partial(reap), Uniform(0.25))
    reached = modules_of(MAKERS["plan"], method)
    kinds = {
        kind: {one for one in reached if one.startswith(f"moe_lab.methods.{kind}.")}
        for kind in ("metrics", "ratios", "grouping", "condense")
    }
    assert kinds["metrics"] - {"moe_lab.methods.metrics.base"} == {"moe_lab.methods.metrics.reap"}
    assert "moe_lab.methods.ratios.uniform" in kinds["ratios"]
    assert not any("global" in one or "all_layers" in one for one in kinds["ratios"])
    assert not kinds["condense"]


def test_carrying_out_a_plan_depends_on_the_kinds_of_its_edits() -> None:
    plan = Plan((MergeExperts(1, "a"), KeepLayer(2, "b")))
    reached = modules_of(MAKERS["compress"], *plan.kinds())
    assert {"moe_lab.models.edits.merge", "moe_lab.models.merging"} <= reached
    assert not {"moe_lab.models.edits.keep", "moe_lab.models.edits.condense"} & reached


def test_every_result_is_kept_by_all_code_that_it_depends_on(job: Callable[..., Outcome]) -> None:
    few = ["measure.repeats=1", "measure.prompt_length=8", "measure.decode_tokens=1"]
    outcome = job("eval=perplexity", "eval.held_out.num_samples=2", "measure=speed", *few)
    assert outcome.code == 0, outcome.text
    for name in ("profile", "compress", "evaluate", "measure"):
        for file in outcome.store.glob(f"{name}/*/artifact.json"):
            identity: dict[str, Any] = json.loads(file.read_text())["identity"]
            kinds: set[type] = {PruneExperts} if name == "compress" else set()
            kinds |= {Greedy} if name == "evaluate" else set()
            assert identity["code"] == code_version(MAKERS[name], *kinds), name
