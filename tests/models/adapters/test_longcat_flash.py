"""LongCat-Flash: zero experts copy, are counted apart, and are never removed."""

from __future__ import annotations

import pytest
import torch
from families import tiny_batch
from odd_families import odd_model, stock_routers

from moe_lab.models.editing import prune_layer, replace_experts
from moe_lab.models.layers import moe_layers
from moe_lab.models.stream import LayerStream
from moe_lab.profile.all_experts import ExpertSample
from moe_lab.profile.collect import collect_statistics
from moe_lab.profile.weights import weight_statistics
from moe_lab.types import UserError


@pytest.mark.parametrize("zeros", [0, 4, 8])  # 8: as many as experts
def test_rows_of_zero_experts_stay(zeros: int) -> None:
    layer = moe_layers(odd_model("longcat_flash", zero_expert_num=zeros))[0]
    rows = layer.router.classifier.weight.detach().clone()
    info = layer.info
    assert (info.num_experts, info.zero_experts, info.num_rows) == (8, zeros, 8 + zeros)
    prune_layer(layer, [5, 0, 3])
    assert torch.equal(layer.router.classifier.weight, rows[[5, 0, 3, *range(8, 8 + zeros)]])
    assert layer.router.n_routed_experts == layer.experts.total_experts == 3 + zeros
    assert (layer.experts.num_routed_experts, layer.experts.zero_experts) == (3, zeros)
    assert layer.experts.gate_up_proj.shape[0] == 3 + zeros


def test_what_zero_experts_get_is_counted_apart() -> None:
    stock, chosen = odd_model("longcat_flash"), dict[int, torch.Tensor]()
    for index, router in stock_routers(stock).items():
        router.register_forward_hook(
            lambda module, args, output, index=index: chosen.update({index: output[2]})
        )
    stock(**tiny_batch())
    valid = tiny_batch()["attention_mask"].bool().flatten()
    for one in collect_statistics(odd_model("longcat_flash"), [tiny_batch()]):
        expected = int((chosen[one.info.index][valid] >= 8).sum())
        assert 0 < expected == one["zero_count"].item()
        assert one["count"].sum().item() + expected == one["tokens"].item() * 3
        shapes = {name: tuple(value.shape) for name, value in one.sums.items()}
        assert shapes["probability_sum"] == shapes["router_norm"] == (8,)
        assert shapes["logit_product_sum"] == shapes["pair_count"] == (8, 8)
        assert shapes["rank_count"] == (3, 8)
        assert one["probability_sum"].sum() < one["tokens"].item()


def test_weights_of_zero_experts_that_nothing_reads_enter_no_sum() -> None:
    layer = moe_layers(odd_model("longcat_flash"))[0]
    before = weight_statistics(layer)
    with torch.no_grad():
        layer.experts.gate_up_proj[8:] = 1e6
    after = weight_statistics(layer)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_rows_of_removed_experts_cannot_stay() -> None:
    layer = moe_layers(odd_model("longcat_flash"))[0]
    with pytest.raises(UserError, match=r"method\.replacement=nothing"):
        replace_experts(layer, [0, 1, 2], "copy")


def test_what_layers_are_without_some_experts_is_refused() -> None:
    stream = LayerStream(odd_model("longcat_flash"), [tiny_batch()])
    with pytest.raises(UserError, match="longcat_flash has zero experts"):
        ExpertSample(stream)


def test_one_expert_a_token() -> None:
    """Which the stock loop over experts cannot do: as two of which one weighs nothing."""
    experts = moe_layers(odd_model("longcat_flash"))[0].experts
    x_TD = torch.randn(5, 32)
    index_T1, weight_T1 = torch.tensor([[0], [9], [3], [3], [11]]), torch.rand(5, 1)
    other = torch.cat([index_T1, (index_T1 + 1) % 12], dim=1)
    two = experts(x_TD, other, torch.cat([weight_T1, torch.zeros(5, 1)], dim=1))
    torch.testing.assert_close(experts(x_TD, index_T1, weight_T1), two)
