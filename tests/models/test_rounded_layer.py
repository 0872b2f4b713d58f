"""Experts in few bits for a while."""

from __future__ import annotations

import pytest
import torch
from families import logits_of, tiny_model

from moe_lab.models.layers import moe_layers
from moe_lab.models.rounded_layer import rounded_layer
from moe_lab.models.rounding import Scheme, dequantised, rounded


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_are_what_a_reader_makes_of_them(family: str) -> None:
    model = tiny_model(family)
    layer, before = moe_layers(model)[1], logits_of(model)
    weight = layer.experts.down_proj.detach().clone()
    with rounded_layer(layer, Scheme(3, 8)):
        turned = layer.experts.is_transposed  # [I, D], whose inputs come first
        matrix = weight[5].T if turned else weight[5]
        read = dequantised(rounded(matrix, Scheme(3, 8)))
        assert torch.equal(layer.experts.down_proj[5], read.T if turned else read)
        assert not torch.equal(logits_of(model), before)
    assert torch.equal(logits_of(model), before)


def test_scales_are_of_the_units_that_stay() -> None:
    layer = moe_layers(tiny_model("mixtral"))[1]
    weight = layer.experts.down_proj.detach().clone()
    kept_EI = torch.zeros(8, 16, dtype=torch.bool)
    kept_EI[:, [1, 3, 4, 6, 9, 10, 11, 15]] = True
    with rounded_layer(layer, Scheme(3, 4), kept_EI=kept_EI):
        for expert in (0, 7):
            expected = dequantised(rounded(weight[expert][:, kept_EI[expert]], Scheme(3, 4)))
            assert torch.equal(layer.experts.down_proj[expert][:, kept_EI[expert]], expected)
            gone = ~kept_EI[expert]
            assert torch.equal(layer.experts.down_proj[expert][:, gone], weight[expert][:, gone])
