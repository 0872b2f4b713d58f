"""Plans in which hidden units go: what stays, what is told, what is refused."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from families import logits_of, tiny_batch, tiny_model
from slow_neurons import NEURON_FAMILIES, profile_of

from moe_lab.methods.metrics.camera import camera
from moe_lab.methods.metrics.energy import energy
from moe_lab.methods.metrics.reap import reap
from moe_lab.methods.narrowing import Narrowing, narrow_edit
from moe_lab.methods.prune import Prune
from moe_lab.methods.ratios.all_layers import Global
from moe_lab.methods.ratios.neurons import ranked_by_expert
from moe_lab.methods.ratios.sensitivity import Sensitivity
from moe_lab.methods.ratios.uniform import Uniform
from moe_lab.models.edits.plan import apply_plan
from moe_lab.models.layers import moe_layers
from moe_lab.models.narrowing import left_with
from moe_lab.profile.collect import collect_statistics
from moe_lab.types import UserError


def prune(**more: Any) -> Prune:
    options = {"metric": energy, "ratio": Uniform(0.5), "unit": "neurons"} | more
    return Prune(**options)


@pytest.mark.parametrize("family", NEURON_FAMILIES)
def test_the_best_units_of_each_expert_stay(family: str) -> None:
    model, batch = tiny_model(family), tiny_batch()
    profile = profile_of(model, [batch])
    method = prune()
    method.check([layer.info for layer in moe_layers(model)])
    plan = method.plan(profile)
    masks = {}
    for edit, layer in zip(plan.edits, profile.statistics, strict=True):
        index, score = layer.info.index, energy(layer)
        assert (edit.kind, edit.widths) == ("narrow", (8,))
        kept = plan.tensors[f"layers.{index}.neurons"].bool()
        for row, mask in zip(score, kept, strict=True):
            assert sorted(row[mask].tolist()) == sorted(row.tolist())[8:]
        torch.testing.assert_close(plan.tensors[f"layers.{index}.neuron_scores"], score.float())
        assert edit.scores == pytest.approx(score.sum(dim=1).tolist())
        masks[index] = kept
    # What the plan makes of a model is the model with these units silenced.
    with left_with(model, masks):
        expected = logits_of(model, batch)
    changed = copy.deepcopy(model)
    apply_plan(changed, plan)
    torch.testing.assert_close(logits_of(changed, batch), expected, rtol=1e-4, atol=1e-5)
    assert {layer.info.expert_width for layer in moe_layers(changed)} == {8}
    units = sum(mask.numel() for mask in masks.values())
    words = f"{units // 2} of {units} hidden units"
    assert plan.notes["given"] == {"ratio": 0.5, "hidden_units": words}


def test_by_expert_and_over_all_layers_it_is_one_ranking() -> None:
    model = tiny_model("mixtral")
    profile = profile_of(model, [tiny_batch()])
    plan = prune(ratio=Global(0.5), widths="by_expert").plan(profile)
    scores = torch.stack([energy(layer) for layer in profile.statistics])
    kept = torch.stack([plan.tensors[f"layers.{i}.neurons"].bool() for i in range(4)])
    assert kept.sum() == scores.numel() // 2
    assert scores[kept].min() >= scores[~kept].max()
    widths = [edit.widths for edit in plan.edits]
    assert [list(one) for one in widths] == kept.sum(dim=2).tolist()


def test_a_papers_own_ranking_is_taken_unless_it_is_said() -> None:
    profile = profile_of(tiny_model("mixtral"), [tiny_batch()])

    bound = functools.partial(camera, alpha=1.0)
    own = prune(metric=bound).plan(profile)
    told = prune(metric=bound, widths="by_expert").plan(profile)
    even = prune(metric=bound, widths="by_layer").plan(profile)
    assert own.edits == told.edits
    assert {edit.widths for edit in even.edits} == {(8,)}
    assert own.notes["widths"] == "by_expert"


def test_behind_narrowed_layers_they_are_measured_again() -> None:
    model, batches = tiny_model("qwen2_moe"), [tiny_batch(0), tiny_batch(1)]
    plan = prune(propagate=True).plan(profile_of(model, batches))
    changed = copy.deepcopy(model)
    for number, edit in enumerate(plan.edits):
        layer = collect_statistics(changed, batches, neurons=True)[number]
        found = plan.tensors[f"layers.{edit.index}.neuron_scores"]
        torch.testing.assert_close(found, energy(layer).float(), rtol=1e-4, atol=1e-6)
        apply_plan(changed, type(plan)((edit,), tensors=plan.tensors))


def test_shared_experts_get_narrower_too() -> None:
    model, batch = tiny_model("qwen2_moe"), tiny_batch()
    profile = profile_of(model, [batch])
    infos = [layer.info for layer in profile.statistics]
    for widths in ("by_layer", "by_expert"):
        method = prune(shared=True, widths=widths)
        method.check(infos)
        plan = method.plan(profile)
        changed = copy.deepcopy(model)
        apply_plan(changed, plan)
        for edit, layer, statistics in zip(
            plan.edits, moe_layers(changed), profile.statistics, strict=True
        ):
            kept = plan.tensors[f"layers.{edit.index}.shared_neurons"].bool()
            score = energy(statistics.shared())[0]
            assert edit.shared_width == layer.info.shared_width == kept.sum()
            assert sorted(score[kept].tolist()) == sorted(score.tolist())[24 - edit.shared_width :]
            assert layer.shared.down_proj.weight.shape == (32, edit.shared_width)
        if widths == "by_layer":
            assert {edit.shared_width for edit in plan.edits} == {12}
    with pytest.raises(UserError, match="no shared experts"):
        prune(shared=True).check([one.info for one in moe_layers(tiny_model("mixtral"))])


def test_super_experts_keep_all_their_units() -> None:
    model = tiny_model("mixtral")
    with torch.no_grad():
        moe_layers(model)[1].experts.down_proj[5] *= 1e4
    profile = profile_of(model, [tiny_batch()])
    plan = prune(protect="super_experts", widths="by_expert").plan(profile)
    assert plan.notes["protected"] == {"1": [5]}
    assert plan.edits[1].widths[5] == 16
    with pytest.raises(UserError, match=r"method.widths=by_expert"):
        prune(protect="super_experts").check([one.info for one in moe_layers(model)])


@pytest.mark.parametrize("error", ["kl", "output"])
@pytest.mark.parametrize("widths", ["by_layer", "by_expert"])
def test_sensitivity_measures_models_without_these_units(error: str, widths: str) -> None:
    model, batch = tiny_model("mixtral"), tiny_batch()
    profile = profile_of(model, [batch])
    ratio = Sensitivity(0.5, error=error, num_samples=3, step=8 if widths == "by_layer" else 64)
    plan = prune(ratio=ratio, widths=widths).plan(profile)
    curve = plan.notes["errors"]["2"]
    narrowing = Narrowing(prune()._metric, ratio, widths)
    score = energy(profile.statistics[2])
    pool, _ = narrowing._ranked(profile.statistics[2].info, score, None, {})
    number = pool.num_experts // 2
    with left_with(model, {2: pool.kept(number)}):
        theirs = logits_of(model, batch)[batch["attention_mask"].bool()]
    ours = logits_of(model, batch)[batch["attention_mask"].bool()]
    if error == "kl":
        p, q = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
        expected = float((p.exp() * (p - q)).sum(-1).mean())
        assert curve[str(number)] == pytest.approx(expected, rel=1e-3)
    kept = {e.index: plan.tensors[f"layers.{e.index}.neurons"] for e in plan.edits}
    assert sum(int(mask.sum()) for mask in kept.values()) == 4 * 8 * 16 // 2
    assert sorted(curve.values()) == list(curve.values()), "with fewer units the error grows"


def test_what_neurons_do_not_know_is_refused() -> None:
    infos = [one.info for one in moe_layers(tiny_model("mixtral"))]
    for options, words in (
        ({"metric": reap}, "no score of them .*method.unit=experts.*energy"),
        ({"unit": "experts"}, "method.unit=neurons.*metric=.*reap"),
        ({"replacement": "zero"}, "all experts stay"),
        ({"unit": "experts", "metric": reap, "widths": "by_layer"}, "method.unit=neurons, too"),
        ({"unit": "experts", "metric": reap, "shared": True}, "method.unit=neurons, too"),
        ({"ratio": Uniform(0.97)}, "hidden units"),
    ):
        with pytest.raises(UserError, match=words):
            prune(**options).check(infos)


def test_the_form_is_foreseen_where_the_widths_are() -> None:
    infos = [one.info for one in moe_layers(tiny_model("qwen2_moe"))]
    even = prune(shared=True).example(infos)
    assert {(edit.widths, edit.shared_width) for edit in even} == {((8,), 12)}
    uneven = prune(ratio=Global(0.5)).example(infos)
    assert len({edit.widths for edit in uneven}) == 2
    assert len(prune(widths="by_expert").example(infos)[0].widths) == 8


def test_an_edit_says_how_wide_each_expert_stays() -> None:
    layer = profile_of(tiny_model("mixtral"), [tiny_batch()]).statistics[0]
    score = energy(layer)
    pool, _ = ranked_by_expert(layer.info, score)
    tensors: dict[str, torch.Tensor] = {}
    edit = narrow_edit(pool, 50, score, tensors)
    assert sum(edit.widths) == 50
    assert tensors["layers.0.neurons"].sum(dim=1).tolist() == list(edit.widths)
