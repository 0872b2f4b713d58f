"""What a token uses of a model, as its router chooses and as it is routed."""

from __future__ import annotations

import pytest
from families import tiny_model

from moe_lab.models.active import active_parameters, expert_flops, num_real_experts, parameters
from moe_lab.models.editing import replace_experts
from moe_lab.models.layers import moe_layers

EXPERT = 3 * 32 * 16  # weights of one expert of the tiny families


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_every_expert_that_is_used_counts(family: str) -> None:
    model = tiny_model(family)
    indices = [layer.info.index for layer in moe_layers(model)]
    top_k = moe_layers(model)[0].info.top_k
    assert active_parameters(model, dict.fromkeys(indices, 8.0)) == parameters(model)
    assert active_parameters(model, dict.fromkeys(indices, float(top_k))) == active_parameters(
        model
    )
    used = dict.fromkeys(indices, float(top_k)) | {indices[0]: top_k - 0.5}
    assert active_parameters(model) - active_parameters(model, used) == EXPERT // 2
    assert expert_flops(model, used) == 2 * EXPERT * sum(used.values())


def test_experts_that_are_gone_are_none() -> None:
    model = tiny_model("mixtral")
    replace_experts(moe_layers(model)[1], [0, 3, 5], "zero")
    layer = moe_layers(model)[1]
    assert (num_real_experts(layer), layer.info.num_experts) == (3, 8)
    used = {one.info.index: 2.0 for one in moe_layers(model)}
    assert active_parameters(model, used) == active_parameters(model)
    assert expert_flops(model, used) == 2 * EXPERT * 8
