"""Merges: plans, budgets, orders of layers, propagation, saving, whole runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from edited_models import edited, in_fresh_process, make_identical
from families import logits_of, tiny_batch, tiny_model
from merges import KINDS, plan_of, profile_of
from running import Outcome
from torch import nn
from transformers import AutoModelForCausalLM

from moe_lab.methods.grouping.base import as_grouping
from moe_lab.methods.grouping.hc_smoe import HCSMoE
from moe_lab.methods.grouping.ream import Ream
from moe_lab.methods.merge import Merge
from moe_lab.methods.metrics.frequency import frequency
from moe_lab.methods.metrics.reap import reap
from moe_lab.methods.ratios.all_layers import Global
from moe_lab.methods.ratios.budget import kept
from moe_lab.methods.ratios.uniform import Uniform
from moe_lab.models.checkpoint import load
from moe_lab.models.edits.plan import Plan, apply_plan
from moe_lab.models.layers import moe_layers, num_parameters
from moe_lab.models.saving import save_checkpoint
from moe_lab.profile.collect import collect_statistics
from moe_lab.profile.layer import LayerStatistics
from moe_lab.profile.profile import Profile
from moe_lab.types import LayerInfo, UserError

INFO = LayerInfo(3, "model.layers.3.mlp", num_experts=6, top_k=2, hidden_size=2)


def test_experts_without_tokens_weigh_nothing_or_alike() -> None:
    layer = LayerStatistics(INFO)
    product = torch.eye(6, dtype=torch.float64)
    product[0, 2] = product[2, 0] = product[1, 3] = product[3, 1] = 0.5
    product[4, 4] = product[5, 5] = 0.0  # logits that are always 0
    layer.sums |= {
        "count": torch.tensor([3.0, 0, 1, 0, 0, 0], dtype=torch.float64),
        "logit_product_sum": product,
    }
    method = Merge(1, 2, layers=[3])
    [edit] = method.plan(Profile([layer])).edited()
    assert edit.kept == (0, 2)
    assert edit.groups[0][0] == 0
    assert edit.weights == ((1.0, 0.0, 0.0, 0.0, 0.0), (1.0,))
    assert edit.scores == (3.0, 0.0, 1.0, 0.0, 0.0, 0.0)
    layer.sums["count"] = torch.zeros(6, dtype=torch.float64)
    [edit] = method.plan(Profile([layer])).edited()
    assert [set(shares) for shares in edit.weights] == [{1 / len(group)} for group in edit.groups]


MERGED = ("qwen2_moe", "mixtral", "olmoe", "deepseek_v2", "deepseek_v3")


def test_plans_of_real_models_are_carried_out_and_loaded_by_stock(tmp_path: Path) -> None:
    for family in MERGED:
        model = tiny_model(family)
        infos = [layer.info for layer in moe_layers(model)]
        statistics = collect_statistics(model, [tiny_batch()])
        for name, layers in (("all", "all"), ("one", [3])):
            method = Merge(1, 4, layers=layers, router="dominant")
            method.check(infos)
            made = method.plan(Profile(statistics))
            (tmp_path / "plan.json").write_text(made.to_text())
            assert Plan.load(tmp_path / "plan.json") == made
            edits = json.loads((tmp_path / "plan.json").read_text())["layers"]
            for edit in edits:
                del edit["name"]
                groups = edit.get("groups", [])
                assert sorted(e for group in groups for e in group) in ([], list(range(8)))
            folder = tmp_path / f"{family} {name}"
            assert edited(family, edits, folder) == (name == "all")
            counts = [layer.info.num_experts for layer in moe_layers(load(folder / "model"))]
            assert counts == [8 if layers == [3] and i.index != 3 else 4 for i in infos]
    for which, name in (("stock", "all"), ("ours", "one")):
        names = [f"{family} {name}" for family in MERGED]
        found = in_fresh_process(which, [tmp_path / name for name in names])
        assert found == dict.fromkeys(names, 0.0)


def test_each_order_of_layers_is_its_own() -> None:
    model = tiny_model("mixtral")
    with torch.no_grad():
        for layer, scale in zip(moe_layers(model), (1.0, 0.01, 0.3, 0.1), strict=True):
            layer.experts.down_proj *= scale
    statistics = collect_statistics(model, [tiny_batch()])

    def order(layers: object, seed: int = 0) -> tuple[int, ...]:
        made = Merge(2, 4, layers=layers, seed=seed).plan(Profile(statistics))
        assert {edit.index for edit in made.edited()} == set(made.layer_order)
        return made.layer_order

    assert order("all") == (0, 1, 2, 3)
    assert order("cosine") == (1, 3)
    assert order("first") == (0, 1)
    assert order("last") == (3, 2)
    assert order([2, 0]) == (2, 0)
    drawn = {order("random", seed) for seed in range(8)}
    assert order("random", 1) == order("random", 1)
    assert len(drawn) > 3


def test_impossible_requests_are_refused_before_any_work() -> None:
    Merge(1, 2).check([INFO])
    with pytest.raises(UserError, match=r"num_experts=1 is too few: layer 3: 1 of 6.*chooses 2"):
        Merge(1, 1, router="dominant").check([INFO])
    Merge(1, 1).check([INFO])  # all its rows lead to one expert
    with pytest.raises(UserError, match=r"num_experts=0"):
        Merge(1, 0).check([INFO])
    for number in (6, 7):
        with pytest.raises(UserError, match=rf"num_experts={number}: layer 3 has 6 experts"):
            Merge(1, number).check([INFO])
    grouped = LayerInfo(1, "x", 8, 2, 2, groups=2, groups_used=1)
    with pytest.raises(UserError, match=r"too few.*2 groups"):
        Merge(1, 2, router="dominant").check([grouped])
    Merge(1, 2).check([grouped])
    with pytest.raises(UserError, match=r"num_experts=3.*2 groups"):
        Merge(1, 3).check([grouped])
    for name, words in {
        "router": "=last: there are all, dominant, mean, sum, or null",
        "align": "=last: there are none, weights, activations, both, or null",
        "grouping": "='last' does not exist; there are hc_smoe, m_smoe, mergemoe, ream",
    }.items():
        with pytest.raises(UserError, match=f"method.{name}{words}"):
            Merge(1, 2, **{name: "last"}).check([INFO])
    with pytest.raises(UserError, match=r"grouping.linkage=last: there are average, complete"):
        Merge(1, 2, grouping=HCSMoE("last")).check([INFO])
    with pytest.raises(UserError, match=r"group_size=2: 2 groups.*its 6 experts; at least 3"):
        Merge(1, 2, grouping=Ream(2)).check([INFO])
    with pytest.raises(UserError, match=r"must be made by a class derived from .*\.Grouping"):
        Merge(1, 2, grouping=Uniform(0.25)).check([INFO])
    with pytest.raises(UserError, match=r"ratio=null and .*num_experts=null.*num_experts=4"):
        Merge(1).check([INFO])
    with pytest.raises(UserError, match=r"condense.num_layers=0: it must be at least 1"):
        Merge(0, 2).check([INFO])
    with pytest.raises(UserError, match=r"num_samples=0"):
        Merge(1, 2, num_samples=0).check([INFO])
    with pytest.raises(UserError, match=r"ratio=1"):
        Merge(1, ratio=Uniform(ratio=1.0)).check([INFO])
    with pytest.raises(UserError, match=r"layers='best' does not exist.*all, cosine"):
        Merge(1, 2, layers="best").check([INFO])
    with pytest.raises(UserError, match=r"names \[2\]"):
        Merge(1, 2, layers=[2]).check([INFO])


def experts_in(report: dict) -> list[int]:
    infos = [layer.info for layer in moe_layers(load(report["compressed/checkpoint"]))]
    return [info.real_experts or info.num_experts for info in infos]


def test_a_whole_run(job: Callable[..., Outcome]) -> None:
    done = job("method=merge", "method.num_experts=4", "method.layers=last")
    assert done.code == 0, done.text
    report = done.report
    assert (report["method"], report["merge/num_experts"], report["merge/layers"]) == (
        "merge",
        4,
        "last",
    )
    assert report["plan/layers"] == "[3]"
    assert experts_in(report) == [8, 8, 4]
    refused = job("method=merge", "method.num_experts=2", "method.router=dominant")
    assert refused.code == 2
    assert "num_experts=2 is too few: layer 1: 2 of 8" in refused.text


@pytest.mark.parametrize(("grouping", "stock"), [("hc_smoe", False), ("ream", True)])
def test_whole_runs_of_other_groupings(
    grouping: str, stock: bool, job: Callable[..., Outcome]
) -> None:
    done = job("method=merge", f"method.grouping={grouping}", "ratio.ratio=0.25")
    assert done.code == 0, done.text
    report = done.report
    found = [report[name] for name in ("ratio", "ratio_method", "merge/grouping")]
    assert found == [0.25, "uniform", grouping]
    assert report["compressed/stock"] == stock
    assert experts_in(report) == [6, 6, 6]


PAIRS = ((0, 2), (1, 3), (4, 7), (5, 6))  # within the router groups 0-3 and 4-7 of deepseek_v3


def with_identical(family: str, groups: Sequence[Sequence[int]]) -> nn.Module:
    """Each group's experts compute the same, with their hidden units shuffled."""
    model = tiny_model(family)
    for layer in moe_layers(model):
        make_identical(layer.experts, groups)
    return model


@pytest.mark.parametrize("family", KINDS)
def test_merged_identical_experts_change_nothing(family: str) -> None:
    """Clustering finds them, all alignments match their shuffled units, all router rows live on."""
    for grouping, groups in (("hc_smoe", PAIRS), ("m_smoe", [range(8)]), ("ream", [range(8)])):
        dense = with_identical(family, groups)
        before = logits_of(dense)
        for align in ("weights", "activations", "both"):
            options = {"align": align, "router": "all", "propagate": False}
            made = plan_of(dense, grouping=grouping, **options)
            if grouping == "hc_smoe":
                found = [{frozenset(group) for group in edit.groups} for edit in made.edits]
                assert found == [{frozenset(pair) for pair in PAIRS}] * len(made.edits)
            merged = with_identical(family, groups)
            apply_plan(merged, made)
            torch.testing.assert_close(logits_of(merged), before, rtol=1e-3, atol=1e-3)
            made = plan_of(dense, grouping=grouping, **(options | {"align": "none"}))
            merged = with_identical(family, groups)
            apply_plan(merged, made)
            assert not torch.allclose(logits_of(merged), before, rtol=1e-2, atol=1e-2)


def test_a_ratio_says_how_many_stay() -> None:
    model = tiny_model("mixtral")
    made = plan_of(model, num_experts=None, ratio=Uniform(ratio=0.25))
    assert [len(edit.kept) for edit in made.edits] == [6] * 4
    profile = profile_of(model)
    for grouping, metric in (("hc_smoe", frequency), ("ream", reap)):
        ratio = Global(ratio=0.4)
        method = Merge(1, ratio=ratio, grouping=grouping, propagate=False, align="none")
        made = method.plan(profile)
        scores = [(one.info, metric(one)) for one in profile.statistics]
        numbers = ratio.numbers(scores, profile)
        assert {e.index: len(e.kept) or 8 for e in made.edits} == dict(numbers)
        assert len(set(numbers.values())) > 1
        chosen = {edit.index: set(edit.kept) for edit in made.edited()}
        if grouping == "ream":  # its centroids are what pruning would keep
            assert chosen == {i: set(kept(scores, numbers)[i]) for i in chosen}


def test_options_that_decide_nothing_are_in_no_identity() -> None:
    options: dict[str, object] = dict.fromkeys(field.name for field in fields(Merge))
    options["ratio"] = {"ratio": 0.25, "target_gib": 1.0}

    def known(**given: object) -> set[str]:
        return set(Merge(1, **given).identity(options))

    def grouping(given: object) -> object:
        return Merge(1, grouping=given).identity(options | {"grouping": given})["grouping"]

    assert known(num_experts=2) == {
        "num_experts",
        "grouping",
        "layers",
        "align",
        "router",
        "propagate",
        "refit",
        "mtp",
        "lm_head",
    }
    assert known(refit=True) - known() == {"targets", "token_weight"}
    assert known(grouping="hc_smoe") - known() == {"num_samples"}
    assert grouping("hc_smoe") == {"name": "hc_smoe", "linkage": "average"}
    assert grouping("ream") == {"name": "ream", "group_size": 16}
    node = {"_target_": "moe_lab.methods.grouping.ream.Ream", "group_size": 8}
    made = Merge(1, grouping=Ream(8)).identity(options | {"grouping": node})
    assert made["grouping"] == {"name": "ream", "group_size": 8}
    assert known(align="both") - known() == {"num_samples"}
    assert known(layers="random") - known() == {"seed", "num_layers"}
    ratio = Uniform(0.25, target_gib=1.0)
    assert Merge(1, ratio=ratio).identity(options)["ratio"] == {"target_gib": 1.0}
    assert Merge(1, grouping="ream").identity(options)["router"] == "dominant"


@pytest.mark.parametrize("grouping", ["m_smoe", "hc_smoe", "ream"])
def test_propagated_layers_are_those_behind_merged_ones(grouping: str, tmp_path: Path) -> None:
    """Each layer's edit is what the model, merged up to there, gives; the first no other."""
    model = tiny_model("qwen2_moe")
    options = {"grouping": grouping, "router": "all", "align": "both", "num_samples": 2}
    made = plan_of(model, propagate=True, **options)
    assert made.notes["statistics"] == "re-measured behind compressed layers"
    intact = plan_of(model, propagate=False, **options)
    assert made.edits[0] == intact.edits[0]
    assert made.edits[1:] != intact.edits[1:]
    (tmp_path / "plan.json").write_text(made.to_text())
    made.write_tensors(tmp_path / "plan.json")
    read = Plan.load(tmp_path / "plan.json")
    assert read == made
    for edit in made.edits[:-1]:
        apply_plan(model, Plan((edit,), tensors=read.tensors))
    [*_, last] = collect_statistics(model, [tiny_batch()])
    scores = as_grouping(grouping).scores(last)
    torch.testing.assert_close(torch.tensor(made.edits[-1].scores), scores.float())
    again = plan_of(model, layers=[last.info.index], propagate=False, **options).edits[-1]
    assert again.groups == made.edits[-1].groups


@pytest.mark.parametrize("grouping", ["m_smoe", "hc_smoe", "ream"])
def test_as_the_paper_does_layers_shrink_and_are_loaded_again(
    grouping: str, tmp_path: Path
) -> None:
    stock = grouping == "ream"
    model = tiny_model("mixtral")
    with torch.no_grad():  # experts 0 and 5 see no token
        model.model.layers[1].mlp.gate.weight[[0, 5]] = 0.0
    model.save_pretrained(tmp_path / "dense")
    before = num_parameters(model)
    made = plan_of(model, num_experts=3, grouping=grouping)
    assert [edit.router for edit in made.edits] == ["dominant" if stock else "all"] * 4
    assert {edit.align for edit in made.edits} == {as_grouping(grouping).align}
    apply_plan(model, made)
    experts = 4 * 5 * 3 * 16 * 32
    assert before - num_parameters(model) == experts + (4 * 5 * 32 if stock else 0)
    form = save_checkpoint(model, tmp_path / "merged", tmp_path / "dense")
    assert form.stock == stock
    assert torch.equal(logits_of(load(tmp_path / "merged")), logits_of(model))
    if stock:
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert torch.equal(logits_of(again), logits_of(model))
