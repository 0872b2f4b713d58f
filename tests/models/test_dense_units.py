"""The hidden units of a layer side by side, against the families' own blocks."""

from __future__ import annotations

import pytest
import torch
from families import tiny_model

from moe_lab.models.condensing import condensed
from moe_lab.models.dense_units import SHARED_PART, UnitWeights, all_units, dense_of
from moe_lab.models.layers import MoELayer, moe_layers
from moe_lab.types import UserError

DENSE = ["qwen2_moe", "mixtral", "deepseek_v3", "olmoe", "glm4_moe"]
GATES = [0.4, 0.1, 0.7]


def layer_of(family: str) -> MoELayer:
    model = tiny_model(family).double()
    model.set_experts_implementation("eager")  # the default one knows no float64
    return moe_layers(model)[-1]


@pytest.mark.parametrize("family", DENSE)
@torch.no_grad()
def test_units_of_experts_make_up_the_condensed_layer(family: str) -> None:
    layer, experts = layer_of(family), [5, 0, 2]
    units_N2 = all_units(layer.info, experts)
    by_part = dict(zip(experts, GATES, strict=True)) | {SHARED_PART: 0.3}
    gate_N1 = torch.tensor(
        [by_part[part] for part in units_N2[:, 0].tolist()], dtype=torch.float64
    )[:, None]
    weights, x_TD = UnitWeights(layer), torch.randn(6, 32, dtype=torch.float64)
    columns_ND = weights.columns(units_N2) * gate_N1
    added_TD = weights.hidden(units_N2)(x_TD) @ columns_ND
    expected = condensed(layer, experts, GATES, 0.3)
    torch.testing.assert_close(added_TD, expected(x_TD), rtol=1e-6, atol=1e-8)
    made = dense_of(layer, len(units_N2), units_N2, columns_ND.T)
    torch.testing.assert_close(made(x_TD), expected(x_TD), rtol=1e-6, atol=1e-8)
    assert not any(weight.requires_grad for weight in made.parameters())


def test_any_order_and_any_units() -> None:
    layer = layer_of("qwen2_moe")
    every_N2, weights = all_units(layer.info), UnitWeights(layer)
    assert len(every_N2) == 24 + 8 * 16
    some = torch.tensor([100, 3, 57])
    for of_all, of_some in zip(weights.rows(every_N2), weights.rows(every_N2[some]), strict=True):
        assert torch.equal(of_all[some], of_some)
    assert torch.equal(weights.columns(every_N2)[some], weights.columns(every_N2[some]))


def test_shapes_alone_on_the_meta_device() -> None:
    with torch.device("meta"):
        layer = moe_layers(tiny_model("qwen2_moe"))[0]
    made = dense_of(layer, 7)
    assert {p.device.type for p in made.parameters()} == {"meta"}
    assert made.down_proj.weight.shape == (32, 7)


def test_a_block_that_is_no_sum_of_gated_mlps_is_refused() -> None:
    with pytest.raises(UserError, match=r"its own block.*condense\.refit=none"):
        UnitWeights(moe_layers(tiny_model("gpt_oss"))[0])
