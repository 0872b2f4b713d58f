"""The matrices of experts as outputs by inputs, in every layout."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, tiny_model
from odd_families import ADAPTED, odd_model
from torch.nn import functional as F

from moe_lab.models.expert_matrices import expert_matrices, other_matrices, own_part
from moe_lab.models.hidden_units import HiddenUnits
from moe_lab.models.layers import MoELayer, moe_layers
from moe_lab.models.widths import set_widths


def layer_of(family: str) -> MoELayer:
    return moe_layers(odd_model(family) if family in ADAPTED else tiny_model(family))[0]


@pytest.mark.parametrize("family", [*FAMILIES, *ADAPTED])
def test_inputs_come_last_and_are_views(family: str) -> None:
    experts = layer_of(family).experts
    units, matrices = HiddenUnits(experts), expert_matrices(experts)
    for name, matrix in matrices.items():
        inputs = 16 if name == units.down else 32
        assert matrix.shape[2] == inputs and matrix.dim() == 3, name
        with torch.no_grad():
            matrix[1, 0].zero_()
    for name, matrix in expert_matrices(experts).items():
        assert not matrix[1, 0].any() and matrix[1, 1].any(), name


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_the_down_projection_maps_what_hidden_units_compute(family: str) -> None:
    experts = layer_of(family).experts
    h = torch.randn(5, 16)
    down = experts.down_proj[3].detach()
    expected = h @ down if experts.is_transposed else h @ down.T
    assert torch.allclose(F.linear(h, expert_matrices(experts)["down_proj"][3]), expected)


def test_other_values_are_there_while_it_is_open() -> None:
    experts = layer_of("gpt_oss").experts
    before = experts.gate_up_proj.detach().clone()
    values = {"gate_up_proj": torch.zeros_like(expert_matrices(experts)["gate_up_proj"])}
    with other_matrices(experts, values):
        assert not experts.gate_up_proj.any()
    assert torch.equal(experts.gate_up_proj, before)


def test_zeros_behind_a_narrow_expert_are_no_part_of_it() -> None:
    experts = layer_of("mixtral").experts
    set_widths(experts, (16, 9, *(16,) * 6))
    assert own_part(experts, "down_proj", 1).shape == (32, 9)
    assert own_part(experts, "down_proj", 0).shape == (32, 16)
    assert own_part(experts, "gate_up_proj", 1).shape == (32, 32)
