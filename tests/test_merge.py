"""Merges carried out: matching of hidden units, averages, routers, layers, saving, whole runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Outcome
from families import FAMILIES, tiny_batch, tiny_model
from test_checkpoint import edited, in_fresh_process
from torch import Tensor, nn

from moe_lab.methods.merge import Merge
from moe_lab.methods.ratios.uniform import Uniform
from moe_lab.models.checkpoint import load
from moe_lab.models.editing import apply_plan
from moe_lab.models.layers import expert_forward, expert_parameters, moe_layers
from moe_lab.models.merging import HiddenUnits, matching
from moe_lab.profile.collect import collect_statistics
from moe_lab.profile.layer import LayerStatistics
from moe_lab.profile.profile import Profile
from moe_lab.types import Edit, LayerInfo, Plan, UserError

EACH_FAMILY = pytest.mark.parametrize("family", FAMILIES)
INFO = LayerInfo(3, "model.layers.3.mlp", num_experts=6, top_k=2, hidden_size=2)
GROUPS = ((0, 3, 5), (1,), (4, 2), (6, 7))  # of 8 experts; deepseek_v3's router has 0-3 and 4-7
KEPT = tuple(group[0] for group in GROUPS)


def merge(index: int, shares: tuple = (0.25, 0.5, 0.25), **options: object) -> dict:
    weights = (shares, (1.0,), (0.75, 0.25), (0.5, 0.5))
    edit = {"index": index, "edit": "merge", "kept": KEPT, "groups": GROUPS, "weights": weights}
    return edit | options


def apply(model: nn.Module, edits: list[dict]) -> nn.Module:
    names = {layer.info.index: layer.info.name for layer in moe_layers(model)}
    apply_plan(model, Plan(tuple(Edit(name=names[edit["index"]], **edit) for edit in edits)))
    return model


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**tiny_batch()).logits


@torch.no_grad()
def make_identical(experts: nn.Module, groups: tuple[tuple[int, ...], ...]) -> None:
    """Make the experts of each group compute the same, with their hidden units shuffled."""
    units, generator = HiddenUnits(experts), torch.Generator().manual_seed(0)
    for first, *others in groups:
        for other in others:
            order = torch.randperm(16, generator=generator)
            copy = units.expert(first, order)
            for name, tensor in units.tensors.items():
                tensor[other] = copy[name]


def outputs(experts: nn.Module, x_TD: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [expert_forward(experts, one, x_TD) for one in expert_parameters(experts)]


def test_matching_undoes_a_permutation() -> None:
    generator = torch.Generator().manual_seed(0)
    units = torch.randn(9, 5, generator=generator)
    order = torch.randperm(9, generator=generator)
    shuffled = units[order]
    assert torch.equal(shuffled[matching(units, shuffled)], units)


@EACH_FAMILY
def test_merging_identical_experts_gives_that_expert_to_the_bit(family: str) -> None:
    """Also where their hidden units come in another order, but only if they are matched."""
    for align in ("weights", "none"):
        model = tiny_model(family)
        layer = moe_layers(model)[-1]
        make_identical(layer.experts, GROUPS)
        x_TD = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
        before = outputs(layer.experts, x_TD)
        for members in GROUPS:  # shuffled units make the same function
            for member in members:
                torch.testing.assert_close(before[member], before[members[0]], rtol=1e-4, atol=1e-5)
        apply(model, [merge(layer.info.index, align=align)])
        after = outputs(moe_layers(model)[-1].experts, x_TD)
        same = [torch.equal(after[i], before[expert]) for i, expert in enumerate(KEPT)]
        assert same == ([True] * 4 if align == "weights" else [False, True, False, False])


@EACH_FAMILY
def test_a_merge_of_identical_experts_is_pruning_the_others(family: str) -> None:
    merged, pruned = tiny_model(family), tiny_model(family)
    indices = [layer.info.index for layer in moe_layers(merged)]
    for model in (merged, pruned):
        for layer in moe_layers(model):
            make_identical(layer.experts, GROUPS)
    before = logits_of(merged)
    apply(merged, [merge(index) for index in indices])
    apply(pruned, [{"index": i, "edit": "prune", "kept": KEPT} for i in indices])
    assert torch.equal(logits_of(merged), logits_of(pruned))
    assert not torch.allclose(logits_of(merged), before, atol=1e-3)  # routers lost rows


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_merging_a_layer_of_one_function_is_the_identity(family: str) -> None:
    """Where weights are renormalised it does not matter which of equal experts are chosen."""
    model = tiny_model(family)
    for layer in moe_layers(model):
        make_identical(layer.experts, (tuple(range(8)),))
    before = logits_of(model)
    apply(model, [merge(layer.info.index) for layer in moe_layers(model)])
    torch.testing.assert_close(logits_of(model), before, rtol=1e-4, atol=1e-4)


@EACH_FAMILY
def test_averages_and_routers_are_what_was_asked_for(family: str) -> None:
    plain, dominant, mean, added = (tiny_model(family) for _ in range(4))
    index = moe_layers(plain)[-1].info.index
    apply(dominant, [merge(index, align="none")])
    apply(mean, [merge(index, align="none", router="mean")])
    apply(added, [merge(index, align="none", router="sum")])
    one, two, three, four = (moe_layers(model)[-1] for model in (plain, dominant, mean, added))
    weights = merge(index)["weights"]

    def averaged(tensor: Tensor) -> Tensor:
        means = [
            sum(share * tensor[member].double() for member, share in zip(members, row, strict=True))
            for members, row in zip(GROUPS, weights, strict=True)
        ]
        return torch.stack(means).float()

    for name, tensor in one.experts.named_parameters():
        assert torch.equal(two.experts.get_parameter(name), averaged(tensor.detach()))
        assert torch.equal(two.experts.get_parameter(name), three.experts.get_parameter(name))
    for name, tensor in one.router.state_dict().items():
        assert torch.equal(two.router.state_dict()[name], tensor[list(KEPT)])
        torch.testing.assert_close(three.router.state_dict()[name], averaged(tensor))
        rows = torch.stack([tensor[list(members)].sum(dim=0) for members in GROUPS])
        torch.testing.assert_close(four.router.state_dict()[name], rows)
    if one.shared is not None:
        for name, tensor in one.shared.named_parameters():
            assert torch.equal(three.shared.get_parameter(name), tensor)


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
            edits = [vars(Edit.from_json(edit)) for edit in edits]
            for edit in edits:
                del edit["name"]
                assert sorted(e for group in edit["groups"] for e in group) in ([], list(range(8)))
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
        "router": "null, all, dominant, mean, sum",
        "align": "null, none, weights, activations, both",
        "grouping": "hc_smoe, m_smoe, ream",
    }.items():
        with pytest.raises(
            UserError, match=f"method.{name}='last' does not exist; there are {words}"
        ):
            Merge(1, 2, **{name: "last"}).check([INFO])
    with pytest.raises(UserError, match=r"linkage='last' does not exist.*average, complete"):
        Merge(1, 2, grouping="hc_smoe", linkage="last").check([INFO])
    with pytest.raises(UserError, match=r"group_size=2: 2 groups.*its 6 experts; at least 3"):
        Merge(1, 2, grouping="ream", group_size=2).check([INFO])
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
