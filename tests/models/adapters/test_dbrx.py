"""DBRX: flat tensors, and a config with parts."""

from __future__ import annotations

import torch
from odd_families import odd_model

from moe_lab.models.editing import prune_layer
from moe_lab.models.forms import set_num_experts
from moe_lab.models.layers import by_expert, moe_layers, rows_of
from moe_lab.models.routers import at_top_k
from moe_lab.profile.weights import weight_statistics


def test_the_rows_of_an_expert_lie_together() -> None:
    layer = moe_layers(odd_model("dbrx"))[0]
    found = {key: (tuple(tensor.shape), at) for _, key, tensor, at in by_expert(layer)}
    flat = ((128, 32), 0)
    assert found == {"w1": flat, "v1": flat, "w2": flat, "weight": ((8, 32), 0)}
    w1 = layer.block.get_parameter("experts.mlp.w1").detach().clone()
    assert rows_of(layer, w1, 0, [2, 0]) == [*range(32, 48), *range(16)]
    prune_layer(layer, [2, 0])
    expected = torch.cat([w1[32:48], w1[:16]])
    assert torch.equal(layer.block.get_parameter("experts.mlp.w1"), expected)
    assert moe_layers(odd_model("dbrx"))[0].info.num_experts == 8


def test_the_number_of_experts_stands_in_a_part_of_the_config() -> None:
    model = odd_model("dbrx")
    set_num_experts(model.config, 5)
    assert model.config.ffn_config.moe_num_experts == 5
    with at_top_k(model, 3):
        assert model.config.ffn_config.moe_top_k == 3
    assert model.config.ffn_config.moe_top_k == 2


def test_sums_of_weights_are_of_all_three_projections() -> None:
    layer = moe_layers(odd_model("dbrx"))[0]
    sums = weight_statistics(layer)
    flat = [layer.block.get_parameter(f"experts.mlp.{name}") for name in ("w1", "v1", "w2")]
    expected = sum(one.detach().view(8, -1).double().abs().sum(dim=1) for one in flat)
    torch.testing.assert_close(sums["weight_abs_sum"], expected)
    assert sums["weight_count"].item() == 3 * 16 * 32
