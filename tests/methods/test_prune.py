"""Pruning: what stands in, which experts are protected, what a plan tells."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from families import tiny_batch, tiny_model
from layer_scores import Listed

from moe_lab.methods.metrics.base import Metric
from moe_lab.methods.metrics.frequency import frequency
from moe_lab.methods.metrics.leave_one_out import LeaveOneOut
from moe_lab.methods.metrics.naee import Naee
from moe_lab.methods.metrics.reap import reap
from moe_lab.methods.metrics.soft_count import soft_count
from moe_lab.methods.prune import Prune, lifted, mean_outputs
from moe_lab.methods.ratios.all_layers import Global
from moe_lab.methods.ratios.uniform import Uniform
from moe_lab.models.edits.plan import apply_plan
from moe_lab.models.layers import moe_layers
from moe_lab.models.stream import LayerStream
from moe_lab.profile.collect import collect_statistics
from moe_lab.profile.profile import Profile
from moe_lab.types import UserError


def profile_of(model, batches) -> Profile:
    statistics = collect_statistics(model, batches)
    return Profile(statistics, lambda number=None: LayerStream(model, batches))


def test_constants_are_mean_outputs_behind_the_pruned_layers(case) -> None:
    model, batches, profile = case.model, case.batches, case.profile()
    found = Prune(reap, Listed(4), replacement="constant", propagate=True).plan(profile)
    first, second = found.edits[:2]
    assert first.replacement == "constant"
    assert {len(tensor) for tensor in found.tensors.values()} == {4}
    changed = copy.deepcopy(model)
    for plan_edit, number in ((first, 0), (second, 1)):
        layer = collect_statistics(changed, batches)[number]
        torch.testing.assert_close(
            found.tensors[f"layers.{plan_edit.index}.constants"],
            mean_outputs(layer, plan_edit.kept),
            rtol=1e-9,
            atol=1e-9,
        )
        if number == 0:
            apply_plan(changed, type(found)((first,), tensors=found.tensors))
    plain = Prune(reap, Listed(4), replacement="constant").plan(profile)
    intact = profile.statistics[1]
    gone = [expert for expert in range(8) if expert not in plain.edits[1].kept]
    expected = plain.tensors[f"layers.{plain.edits[1].index}.constants"]
    for row, expert in zip(expected, gone, strict=True):
        count = float(intact["count"][expert])
        mean = intact["output_sum"][expert] / count if count else torch.zeros_like(row)
        assert torch.equal(row, mean)


def test_protected_experts_stay(case) -> None:
    profile = case.profile()
    scores = [(layer.info, reap(layer)) for layer in profile.statistics]
    worst = {info.index: (int(score.argmin()),) for info, score in scores}
    above = lifted(scores, worst)
    highest = max(float(score.max()) for _, score in scores)
    for (info, score), (_, before) in zip(above, scores, strict=True):
        [expert] = worst[info.index]
        assert highest < float(score[expert]) <= highest * (1 + 1e-12)
        others = [e for e in range(8) if e != expert]
        assert torch.equal(score[others], before[others])
    assert lifted(scores, {}) is scores


def test_super_experts_are_protected(case, monkeypatch) -> None:
    profile = case.profile()
    plain = Prune(reap, Listed(4)).plan(profile)
    info = profile.statistics[0].info
    gone = next(e for e in range(8) if e not in plain.edits[0].kept)
    whole = {layer.info.index: () for layer in profile.statistics}
    monkeypatch.setattr(
        "moe_lab.methods.scored.super_experts", lambda _: whole | {info.index: (gone,)}
    )
    for propagate in (False, True):
        found = Prune(reap, Listed(4), protect="super_experts", propagate=propagate).plan(profile)
        assert gone in found.edits[0].kept and len(found.edits[0].kept) == 4
        assert found.edits[0].scores == pytest.approx(plain.edits[0].scores, rel=1e-12)
        assert found.notes["protected"] == {str(info.index): [gone]}
    many = whole | {info.index: (0, 1, 2, 3, 4)}
    monkeypatch.setattr("moe_lab.methods.scored.super_experts", lambda _: many)
    with pytest.raises(UserError, match=r"super experts.*leaves"):
        Prune(reap, Listed(4), protect="super_experts").plan(profile)


@pytest.mark.parametrize(("protect", "place"), [("super_experts", 0), ("outliers", -1)])
def test_found_super_experts_are_in_the_plan(case, protect: str, place: int) -> None:
    model, batches = case.model, case.batches
    changed = copy.deepcopy(model)
    layer = moe_layers(changed)[place]
    with torch.no_grad():
        layer.experts.down_proj[5] *= 1e4
    profile = profile_of(changed, batches)
    plan = Prune(lambda one: -one["max_activation"], Listed(4), protect=protect).plan(profile)
    assert plan.notes["protected"] == {str(layer.info.index): [5]} and 5 in plan.edits[place].kept
    if place:
        others = Prune(lambda one: -one["max_activation"], Listed(4), protect="super_experts")
        assert not others.plan(profile).notes["protected"]


def test_what_cannot_be_combined() -> None:
    infos = [layer.info for layer in moe_layers(tiny_model("mixtral"))]
    refused = {
        "replacement=nought: there are nothing, zero": dict(replacement="nought"),
        "protect=all: there are super_experts, outliers, or null": dict(protect="all"),
    }
    for message, options in refused.items():
        with pytest.raises(UserError, match=message):
            Prune(reap, Uniform(0.25), **options).check(infos)
    for metric in (LeaveOneOut(), Naee()):
        with pytest.raises(UserError, match=r"method\.propagate=false"):
            Prune(metric, Uniform(0.25), propagate=True).check(infos)
        assert not Prune(metric, Uniform(0.25)).takes_groups
        assert not Prune(metric, Uniform(0.25)).from_routers
        Prune(metric, Uniform(0.25)).check(infos)
    with pytest.raises(UserError, match=r"method\.protect=null"):
        Prune(Naee(), Uniform(0.25), protect="super_experts").check(infos)
    assert Prune(frequency, Uniform(0.25)).takes_groups
    assert Prune(frequency, Uniform(0.25), replacement="zero").from_routers
    for options in (dict(propagate=True), dict(replacement="zero")):
        assert not Prune(frequency, Uniform(0.25), **options).takes_groups
    for options in (dict(protect="super_experts"), dict(replacement="constant")):
        assert not Prune(frequency, Uniform(0.25), **options).from_routers


def test_whole_jobs(job) -> None:
    outcome = job("metric=reap", "ratio.ratio=0.5", "method.propagate=true")
    assert outcome.code == 0, outcome.text
    assert outcome.report["statistics"] == "re-measured behind compressed layers"
    outcome = job("metric=reap", "ratio.ratio=0.5", "method.replacement=constant")
    assert outcome.code == 0, outcome.text
    assert outcome.report["statistics"] == "intact model"
    assert list(outcome.store.glob("plan/*/plan.safetensors"))
    for share in (0.25, 0.5):
        outcome = job("metric=naee", "metric.num_samples=3", f"ratio.ratio={share}")
        assert outcome.code == 0, outcome.text
    plans = [json.loads(path.read_text()) for path in outcome.store.glob("plan/*/plan.json")]
    assert {"1": "exhaustive, 28 subsets", "2": "exhaustive, 28 subsets",
            "3": "exhaustive, 28 subsets"} in [plan.get("naee") for plan in plans]  # fmt: skip
    orders = [path for path in outcome.store.glob("search/*/artifact.json")
              if "naee_order" in path.read_text()]  # fmt: skip
    assert len(orders) == 3
    refused = job("metric=leave_one_out", "metric.measure=kl")
    assert refused.code == 2 and "mse, cosine" in refused.text
    refused = job("metric=leave_one_out", "compute.profile=routers")
    assert refused.code == 2 and "compute.profile=all" in refused.text


def test_notes_go_into_the_plan() -> None:
    statistics = collect_statistics(tiny_model("qwen2_moe"), [tiny_batch()], only_routers=True)
    profile = Profile(statistics)
    made = Prune(soft_count, Global(0.25)).plan(profile)
    assert made.notes["kept_per_layer"] == {str(e.index): len(e.kept) for e in made.edits}
    assert sum(len(edit.kept) for edit in made.edits) == 18
    assert "kept_per_layer" not in Prune(soft_count, Uniform(0.25)).plan(profile).notes


def test_a_reference_enters_a_plan_by_its_content() -> None:
    class Referring(Metric):
        def identity(self, options):
            return {"_target_": options["_target_"], "fingerprint": "0123"}

    options = {"metric": {"_target_": "x", "reference": "/home/a"}, "ratio": {"ratio": 0.25}}
    found = Prune(Referring(), Uniform(0.25)).identity(options)
    assert found == {
        "metric": {"_target_": "x", "fingerprint": "0123"}, "ratio": {"ratio": 0.25}
    }  # fmt: skip
    assert Prune(soft_count, Uniform(0.25)).identity(options) == options
