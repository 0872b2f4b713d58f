"""Thresholds of weights, against the tokens of whole models."""

from __future__ import annotations

import statistics

import pytest
import torch
from expert_sets import Case

from moe_lab.methods.skip import Skip
from moe_lab.methods.skipping.by_weight import behind_heaviest
from moe_lab.models.edits.skip import SkipExperts
from moe_lab.models.layers import moe_layers
from moe_lab.models.probing import route


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_naees_threshold_is_the_median_of_the_text(family: str) -> None:
    """g_2 / g_1 of each token: from the logits where the gates are a softmax of them."""
    case = Case(family)
    plan = Skip("naee").plan(case.profile())
    for edit, layer in zip(plan.edits, moe_layers(case.model), strict=True):
        assert isinstance(edit, SkipExperts) and edit.rule == "ratio" and edit.renormalize
        logits, weights, _ = route(layer, case.inputs(layer.info.index))
        pairs = weights.tolist()
        if family == "mixtral":
            pairs = [sorted(one)[-2:] for one in logits.double().softmax(dim=1).tolist()]
        found = [min(pair) / max(pair) for pair in pairs]
        assert edit.value == pytest.approx(statistics.median(found), rel=1e-5)
        kept = [1 + (one >= edit.value) for one in found]
        assert edit.mean == pytest.approx(statistics.mean(kept), abs=0.01)


def test_what_is_compared_is_behind_the_heaviest() -> None:
    weight_TK = torch.tensor([[0.1, 0.4, 0.2]])
    assert behind_heaviest("ratio", weight_TK)[0].tolist() == pytest.approx([0.5, 0.25])
    assert behind_heaviest("weight", weight_TK)[0].tolist() == pytest.approx([0.2, 0.1])


@pytest.mark.parametrize("rule", ["ratio", "weight"])
def test_the_median_unless_another_quantile_is_asked_for(rule: str) -> None:
    case = Case("qwen2_moe")
    for given, share in ((None, 0.5), (0.9, 0.9)):
        plan = Skip(rule, quantile=given).plan(case.profile())
        assert plan.notes["quantile"] == share
        for edit, layer in zip(plan.edits, moe_layers(case.model), strict=True):
            _, weight_TK, _ = route(layer, case.inputs(layer.info.index))
            values = behind_heaviest(rule, weight_TK).flatten()
            expected = torch.quantile(values, share)
            assert edit.value == pytest.approx(float(expected.detach()), rel=1e-5)
