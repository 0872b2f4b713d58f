"""Thresholds found on text, against the tokens of whole models."""

from __future__ import annotations

import statistics

import pytest
import torch
from expert_sets import Case

from moe_lab.methods.skip import Skip
from moe_lab.methods.skipping.thresholds import quantile, scoring_of
from moe_lab.models.edits.skip import SkipExperts
from moe_lab.profile.fewer_experts import RoutedText
from moe_lab.types import UserError


def test_quantiles_are_pythons() -> None:
    values = [0.3, 0.1, 0.9, 0.4]
    assert quantile(torch.tensor(values), 0.5) == pytest.approx(statistics.median(values))
    for share in (0.0, 0.1, 0.75, 1.0):
        expected = torch.quantile(torch.tensor(values, dtype=torch.float64), share)
        assert quantile(torch.tensor(values), share) == pytest.approx(float(expected), rel=1e-6)
    assert quantile(torch.zeros(0), 0.5) == 0.0


@pytest.mark.parametrize("rule", ["ratio", "weight", "top_p"])
@pytest.mark.parametrize("average", [1.0, 1.7, 3.0])
def test_a_budget_is_kept_on_the_text(rule: str, average: float) -> None:
    plan = Skip(rule, average_top_k=average).plan(Case("qwen2_moe").profile())
    tokens = 48 * 2  # of this text; a quantile lies between two tokens' values
    for edit in plan.edits:
        assert isinstance(edit, SkipExperts)
        assert edit.mean == pytest.approx(average, abs=3 / tokens)
    assert plan.notes["average_top_k"] == average


def test_the_mass_is_the_same_everywhere_and_entropy_has_no_threshold() -> None:
    profile = Case("qwen2_moe").profile()
    assert {edit.value for edit in Skip("top_p", mass=0.3).plan(profile).edits} == {0.3}
    entropy = Skip("entropy", renormalize=False).plan(profile)
    assert {(edit.value, edit.scoring) for edit in entropy.edits} == {(1.0, "softmax")}
    assert all(1 < edit.mean <= 3 and not edit.renormalize for edit in entropy.edits)


@pytest.mark.parametrize(
    ("family", "shared_out"), [("mixtral", True), ("qwen2_moe", False), ("deepseek_v3", True)]
)
def test_weights_go_on_as_the_family_has_them(family: str, shared_out: bool) -> None:
    profile = Case(family).profile()
    for given, expected in ((None, shared_out), (True, True), (False, False)):
        plan = Skip("ratio", renormalize=given).plan(profile)
        assert {edit.renormalize for edit in plan.edits} == {expected}


def test_a_router_without_a_known_distribution_is_refused() -> None:
    info = Case("mixtral").statistics[0].info
    logits_TE = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    weight_TK, index_TK = logits_TE.softmax(dim=1).topk(2)
    assert scoring_of(info, RoutedText(logits_TE, weight_TK, index_TK), "top_p") == "softmax"
    other = RoutedText(logits_TE, weight_TK.square(), index_TK)
    with pytest.raises(UserError, match="rule=top_p looks at the router's whole distribution"):
        scoring_of(info, other, "top_p")
