"""The error without each expert, against copies of the model that are pruned."""

from __future__ import annotations

import pytest
import torch
from expert_sets import Case, slow_error, slow_masked_error

from moe_lab.methods.metrics.leave_one_out import LeaveOneOut
from moe_lab.models import routers
from moe_lab.models.layers import moe_layers
from moe_lab.profile.all_experts import can_keep


@pytest.mark.parametrize("measure", ["mse", "cosine"])
def test_leave_one_out_is_brute_force(case: Case, measure: str) -> None:
    scores = LeaveOneOut(measure).scores(case.profile())
    assert len(scores) == len(case.statistics)
    for layer, score in zip(case.statistics, scores, strict=True):
        index = layer.info.index
        for gone in range(8):
            kept = [expert for expert in range(8) if expert != gone]
            slow = slow_error if can_keep(layer.info, kept) else slow_masked_error
            expected = slow(case, index, kept)[measure == "cosine"]
            exact = case.exact if slow is slow_error else 1e-4
            assert float(score[gone]) == pytest.approx(expected, rel=exact, abs=exact)
        assert (score[layer["count"] > 0] > 0).all()


def test_two_experts_in_a_group() -> None:
    case = Case("deepseek_v3", n_group=4, topk_group=2)
    score = LeaveOneOut().scores(case.profile())[0]
    assert torch.isfinite(score).all() and (score > 0).any()
    layer = moe_layers(case.model)[0]
    with routers.masked_layer(layer, [0, 2, 3, 4, 5, 6, 7]):
        index = layer.router(case.inputs(layer.info.index))[2]
    assert not ((index == 0) | (index == 1)).any()
