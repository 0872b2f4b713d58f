"""The levels of one expert, and an expert that computes with them."""

from __future__ import annotations

import torch
from families import tiny_model

from moe_lab.models.layers import moe_layers
from moe_lab.models.rounding import Scheme, dequantised, rounded
from moe_lab.quantize.column_rounding import LevelChoice, gptq
from moe_lab.quantize.expert_levels import expert_levels, with_levels


def test_levels_of_both_kinds_and_what_is_computed_with_them() -> None:
    layer = moe_layers(tiny_model("gpt_oss"))[0]
    given, before = LevelChoice(Scheme(3, 8)), layer.experts.down_proj.detach().clone()
    plain = expert_levels(layer, 2, given, None, torch.bfloat16)
    matrix = before[2].T.bfloat16()
    assert torch.equal(plain["down_proj"].levels, rounded(matrix, Scheme(3, 8)).levels)
    assert plain["gate_up_proj"].levels.shape == (32, 32)
    x, h = torch.randn(50, 32), torch.randn(50, 16)
    made = expert_levels(layer, 2, given, (x.T @ x, h.T @ h), torch.bfloat16)
    assert torch.equal(made["down_proj"].levels, gptq(matrix, h.T @ h, given).levels)
    with with_levels(layer, 2, made):
        read = dequantised(made["down_proj"]).float()
        assert torch.equal(layer.experts.down_proj[2].T, read)
        assert torch.equal(layer.experts.down_proj[1], before[1])
    assert torch.equal(layer.experts.down_proj, before)
