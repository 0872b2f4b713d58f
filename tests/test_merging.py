"""Merges of tiny real models: groupings, alignment by activations, budgets, propagation, saving."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from families import tiny_batch, tiny_model
from test_merge import logits_of, make_identical
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from moe_lab.methods.grouping import hc_smoe, ream
from moe_lab.methods.grouping.alignment import permutation
from moe_lab.methods.grouping.base import MergeCandidates, grouping_named, grouping_names
from moe_lab.methods.merge import Merge
from moe_lab.methods.metrics.frequency import frequency
from moe_lab.methods.metrics.reap import reap
from moe_lab.methods.ratios.all_layers import Global
from moe_lab.methods.ratios.budget import kept
from moe_lab.methods.ratios.uniform import Uniform
from moe_lab.models.checkpoint import load
from moe_lab.models.editing import apply_plan, prune_layer
from moe_lab.models.layers import (
    expert_forward,
    expert_hidden,
    expert_parameters,
    moe_layers,
    num_parameters,
)
from moe_lab.models.merging import HiddenUnits
from moe_lab.models.saving import save_checkpoint
from moe_lab.models.stream import LayerStream
from moe_lab.profile.all_experts import ExpertSample
from moe_lab.profile.collect import collect_statistics
from moe_lab.profile.profile import Profile
from moe_lab.types import Edit, Plan

FAMILIES = ("qwen2_moe", "mixtral", "deepseek_v3", "gpt_oss")
PAIRS = ((0, 2), (1, 3), (4, 7), (5, 6))  # within the router groups 0-3 and 4-7 of deepseek_v3


def profile_of(model: nn.Module, seed: int = 0) -> Profile:
    batch = tiny_batch(seed)

    def open_stream(num_samples: int | None = None) -> LayerStream:
        return LayerStream(model, [{name: part[:num_samples] for name, part in batch.items()}])

    return Profile(collect_statistics(model, [batch]), open_stream)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_what_groupings_see_of_all_outputs_equals_a_slow_reference(family: str) -> None:
    """And neither the batch size nor padding changes it."""
    model = tiny_model(family)
    batch = tiny_batch()
    rows = [
        {name: values[row : row + 1, : int(batch["attention_mask"][row].sum())]
         for name, values in batch.items()}
        for row in range(3)
    ]  # fmt: skip
    for number, layer in enumerate(moe_layers(model)):
        index = layer.info.index
        found = {}
        for key, batches in (("whole", [batch]), ("rows", rows)):
            with ExpertSample(LayerStream(model, batches)).open(index) as experts:
                found[key] = hc_smoe.output_distances(experts), ream.gated_cosine(experts)
                chunks = list(experts.chunks())
        for one, other in zip(found["whole"], found["rows"], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        x_TD = torch.cat([chunk.x_TD for chunk in chunks])
        logits = torch.cat([chunk.logits_TE for chunk in chunks])
        share = logits.sigmoid() if family == "deepseek_v3" else logits.softmax(dim=-1)
        outputs = [
            expert_forward(layer.experts, one, x_TD) for one in expert_parameters(layer.experts)
        ]
        distances, cosines = found["rows"]
        for a, b in ((0, 1), (2, 6), (number, 7)):
            expected = (outputs[a].mean(dim=0) - outputs[b].mean(dim=0)).norm()
            assert float(distances[a, b]) == pytest.approx(float(expected), rel=1e-4)
            gated = [(share[:, e, None] * outputs[e]).mean(dim=0) for e in (a, b)]
            expected = torch.cosine_similarity(*gated, dim=0)
            assert float(cosines[a, b]) == pytest.approx(float(expected), abs=1e-4)


def plan_of(model: nn.Module, **options: object) -> Plan:
    method = Merge(1, **({"num_experts": 4} | options))
    method.check([layer.info for layer in moe_layers(model)])
    return method.plan(profile_of(model))


def with_identical(family: str, groups: Sequence[Sequence[int]]) -> nn.Module:
    """Each group's experts compute the same, with their hidden units shuffled."""
    model = tiny_model(family)
    for layer in moe_layers(model):
        make_identical(layer.experts, groups)
    return model


@pytest.mark.parametrize("family", FAMILIES)
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


def test_groups_of_one_change_nothing() -> None:
    for grouping in grouping_names():
        model = tiny_model("mixtral")
        before = logits_of(model)
        made = plan_of(model, num_experts=None, ratio=Uniform(ratio=0.0), grouping=grouping)
        assert not made.edited()
        [one, *_] = profile_of(model).statistics
        same = torch.eye(8).double() if grouping == "ream" else 1 - torch.eye(8).double()
        groups = grouping_named(grouping).choose(MergeCandidates(one, 8, same))
        assert groups.groups == tuple((expert,) for expert in range(8))
        edit = Edit(one.info.index, one.info.name, "merge", router="all", **vars(groups))
        apply_plan(model, Plan((edit,)))
        assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("align", ["activations", "both"])
def test_permutations_equal_a_slow_reference(align: str) -> None:
    """The least sum of distances, over all orders of four hidden units."""
    model = tiny_model("mixtral", intermediate_size=4)
    layer = moe_layers(model)[0]
    units, parameters = HiddenUnits(layer.experts), expert_parameters(layer.experts)
    with ExpertSample(LayerStream(model, [tiny_batch()])).open(0) as experts:
        found = permutation(experts, [(2, 0, 7), (1, 4)], with_weights=align == "both")
        x_TD = torch.cat([chunk.x_TD for chunk in experts.chunks()])
    assert torch.equal(found[[1, 2, 3, 5, 6]], torch.arange(4).repeat(5, 1))

    def unit(rows: Tensor) -> Tensor:
        return rows / rows.norm(dim=1, keepdim=True)

    with torch.no_grad():
        hidden = [unit(expert_hidden(layer.experts, one, x_TD).T) for one in parameters]
        weights = [unit(units.weights(expert)) for expert in range(8)]
    for first, member in ((2, 0), (2, 7), (1, 4)):
        cost = (hidden[first][:, None] - hidden[member]).norm(dim=-1)
        if align == "both":
            cost += (weights[first][:, None] - weights[member]).norm(dim=-1)
        best = min(
            itertools.permutations(range(4)), key=lambda order: float(cost[range(4), order].sum())
        )
        assert found[member].tolist() == list(best)


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_move_with_the_experts(family: str) -> None:
    order = [2, 0, 3, 1, 6, 7, 5, 4]  # within router groups; new expert i is old order[i]
    plain, moved = tiny_model(family), tiny_model(family)
    for layer in moe_layers(moved):
        prune_layer(layer, order)
    found = [profile_of(plain), profile_of(moved)]
    for profile, numbers in zip(found, (range(8), order), strict=True):
        for one in profile.statistics:  # ties would go to the lower expert: no two score the same
            for name in ("count", "gate_norm_sum"):
                one.sums[name] = one[name] + torch.tensor(numbers) / 100
    for grouping in grouping_names():
        method = Merge(1, 4, grouping=grouping, propagate=False, align="none")
        one, other = (method.plan(profile) for profile in found)
        for was, now in zip(one.edits, other.edits, strict=True):
            renamed = {frozenset(order[expert] for expert in group) for group in now.groups}
            assert renamed == {frozenset(group) for group in was.groups}
            assert {order[expert] for expert in now.kept} == set(was.kept)
            scores = [was.scores[expert] for expert in order]
            torch.testing.assert_close(torch.tensor(now.scores), torch.tensor(scores))


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
    options = dict.fromkeys(field.name for field in fields(Merge))

    def known(**given: object) -> set[str]:
        return set(Merge(1, **given).identity(options))

    assert known(num_experts=2) == {
        "num_experts",
        "grouping",
        "layers",
        "align",
        "router",
        "propagate",
    }
    assert known(grouping="hc_smoe") - known() == {"linkage", "num_samples"}
    assert known(grouping="ream") - known() == {"group_size", "num_samples"}
    assert known(align="both") - known() == {"num_samples"}
    assert known(layers="random") - known() == {"seed", "num_layers"}
    assert "ratio" in known()
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
    scores = grouping_named(grouping).scores(last)
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
    assert {edit.align for edit in made.edits} == {grouping_named(grouping).align}
    apply_plan(model, made)
    experts = 4 * 5 * 3 * 16 * 32
    assert before - num_parameters(model) == experts + (4 * 5 * 32 if stock else 0)
    form = save_checkpoint(model, tmp_path / "merged", tmp_path / "dense")
    assert form.stock == stock
    assert torch.equal(logits_of(load(tmp_path / "merged")), logits_of(model))
    if stock:
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert torch.equal(logits_of(again), logits_of(model))
