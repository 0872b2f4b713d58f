"""Metrics, ratios and the plans that pruning makes of them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from families import tiny_batch, tiny_model
from test_ratios import keep

from moe_lab.methods.metrics.frequency import frequency
from moe_lab.methods.metrics.random import random
from moe_lab.methods.metrics.reap import reap
from moe_lab.methods.metrics.soft_count import soft_count
from moe_lab.methods.none import Nothing
from moe_lab.methods.prune import Prune
from moe_lab.methods.ratios.uniform import Uniform
from moe_lab.models.routers import SCORINGS, matching_scoring
from moe_lab.profile import collect
from moe_lab.profile.layer import LayerStatistics
from moe_lab.profile.profile import Profile
from moe_lab.types import LayerInfo, Plan, Routing, UserError

INFO = LayerInfo(3, "model.layers.3.mlp", num_experts=4, top_k=2, hidden_size=2)


def by_hand() -> LayerStatistics:
    """Three tokens, four experts, two chosen; written out so that each formula can be checked."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 3.0, 1.0, -2.0], [1.0, 2.0, 0.0, 0.5]])
    probability = logits.softmax(dim=1)
    index = torch.tensor([[0, 1], [1, 2], [1, 0]])
    weight = probability.gather(1, index)
    expert = torch.tensor([0, 0, 1, 1, 1, 2])
    token = torch.tensor([0, 2, 0, 1, 2, 1])
    y = torch.tensor([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [6.0, 8.0]])
    layer = LayerStatistics(INFO)
    layer.add(
        Routing(torch.zeros(3, 2), logits, index, weight, y, expert, token,
                probability[token, expert])
    )  # fmt: skip
    return layer


def test_each_metric_is_its_formula() -> None:
    layer = by_hand()
    p = torch.tensor([[2.0, 1, 0, -1], [0, 3, 1, -2], [1, 2, 0, 0.5]]).softmax(dim=1).double()
    assert frequency(layer).tolist() == [2, 3, 1, 0]
    torch.testing.assert_close(soft_count(layer), p.sum(dim=0), rtol=1e-6, atol=1e-7)
    # REAP is the mean over routed tokens of weight times norm, the weight taken once.
    expected = [
        (p[0, 0] * 5 + p[2, 0] * 2) / 2,
        (p[0, 1] * 1 + p[1, 1] * 1 + p[2, 1] * 2) / 3,
        p[1, 2] * 10,
        0.0,
    ]
    torch.testing.assert_close(reap(layer), torch.tensor(expected, dtype=torch.float64),
                               rtol=1e-6, atol=1e-7)  # fmt: skip


def test_random_depends_on_seed_and_layer_only() -> None:
    layer, other = by_hand(), LayerStatistics(LayerInfo(4, "x", 4, 2, 2))
    assert torch.equal(random(layer, seed=1), random(layer, seed=1))
    assert not torch.equal(random(layer, seed=1), random(layer, seed=2))
    assert not torch.equal(random(layer, seed=1), random(other, seed=1))


def test_sums_add_up_over_batches() -> None:
    once, twice = by_hand(), by_hand()
    for name, value in by_hand().sums.items():
        twice.sums[name] = twice.sums[name] + value
    assert torch.equal(reap(once), reap(twice))
    assert torch.equal(2 * frequency(once), frequency(twice))


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("renormalised", [True, False])
@pytest.mark.parametrize("top_k", [1, 3])
def test_the_routers_scoring_is_recognised(scoring: str, renormalised: bool, top_k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 8, generator=generator)
    weight, index = SCORINGS[scoring](logits).topk(top_k)
    if renormalised and top_k > 1:
        weight = weight / weight.sum(dim=1, keepdim=True)
    assert matching_scoring(logits, index, 2.5 * weight) == scoring
    assert matching_scoring(logits, index, weight.flip(0)) is None


def test_a_soft_count_without_probability_is_refused() -> None:
    layer = by_hand()
    for name in ("probability_sum", "entropy_sum"):
        del layer.sums[name]
        with pytest.raises(UserError, match="no full probability"):
            layer[name]
    with pytest.raises(UserError, match="no full probability"):
        soft_count(layer)


def test_ranks_go_by_weight_and_ties_by_the_routers_order() -> None:
    layer = by_hand()  # two of its tokens give the heavier expert first, one gives it second
    assert layer["rank_count"].tolist() == [[1, 2, 0, 0], [1, 1, 1, 0]]
    tied = LayerStatistics(INFO)
    tied.add_routed(torch.zeros(1, 4), torch.tensor([[3, 1]]), torch.tensor([[0.25, 0.25]]))
    assert tied["rank_count"].tolist() == [[0, 0, 0, 1], [0, 1, 0, 0]]
    assert tied["entropy_sum"].item() == pytest.approx(math.log(4))


def test_uniform_keeps_the_best_and_breaks_ties_downwards() -> None:
    scores = torch.tensor([1.0, 5.0, 5.0, 2.0])
    assert keep(Uniform(0.5), [(INFO, scores)]) == {3: (1, 2)}
    assert keep(Uniform(0.25), [(INFO, scores)]) == {3: (1, 2, 3)}
    assert keep(Uniform(0.0), [(INFO, scores)]) == {3: (0, 1, 2, 3)}
    assert keep(Uniform(0.5), [(INFO, torch.zeros(4))]) == {3: (0, 1)}


def test_groups_keep_the_same_number_each() -> None:
    info = LayerInfo(1, "x", 8, 2, 2, groups=2, groups_used=1)
    scores = torch.tensor([9.0, 8, 7, 6, 1, 2, 3, 4])
    assert keep(Uniform(0.25), [(info, scores)]) == {1: (0, 1, 2, 5, 6, 7)}
    with pytest.raises(UserError, match="groups"):
        Uniform(0.375).check([info])


def test_a_ratio_that_starves_the_router_is_refused_with_the_numbers() -> None:
    Uniform(0.5).check([INFO])
    with pytest.raises(UserError, match=r"0\.75 is too much.*1 of 4.*chooses 2.*At most 0\.5"):
        Uniform(0.75).check([INFO])
    for impossible in (-0.1, 1.0, float("nan")):
        with pytest.raises(UserError, match="at least 0"):
            Uniform(impossible).check([INFO])


def test_statistics_and_plans_survive_the_disk(tmp_path: Path) -> None:
    model = tiny_model("qwen2_moe")
    found = collect.collect_statistics(model, [tiny_batch()])
    collect.save_statistics(found, tmp_path)
    again = collect.load_statistics(tmp_path)
    assert [layer.info for layer in again] == [layer.info for layer in found]
    for one, other in zip(found, again, strict=True):
        assert one.sums.keys() == other.sums.keys()
        assert all(torch.equal(one[name], other[name]) for name in one.sums)
    plan = Prune(metric=reap, ratio=Uniform(0.25)).plan(Profile(again))
    (tmp_path / "plan.json").write_text(plan.to_text())
    assert Plan.load(tmp_path / "plan.json") == plan
    assert all(len(edit.kept) == 6 and edit.edit == "prune" for edit in plan.edits)
    assert not Nothing().plan(Profile(again)).edited()
