"""Bytes of experts in few bits."""

from __future__ import annotations

import pytest
from families import tiny_model

from moe_lab.methods.ratios.bits import WHOLE, Bits
from moe_lab.models.expert_matrices import expert_matrices
from moe_lab.models.layers import moe_layers
from moe_lab.models.packed_size import packed_bytes
from moe_lab.models.rounding import Scheme
from moe_lab.types import LayerInfo, UserError


def test_an_expert_takes_what_its_matrices_and_its_router_row_take() -> None:
    [layer, *_] = moe_layers(tiny_model("mixtral").bfloat16())
    info, bits = layer.info, Bits((2, 4, WHOLE), 8)
    assert bits.expert_bytes(info, info.expert_width, WHOLE) == info.expert_bytes
    shapes = [tuple(one.shape[1:]) for one in expert_matrices(layer.experts).values()]
    assert shapes == [(32, 32), (32, 16)]  # gate and up projection as one
    scheme, row = Scheme(4, 8), 32 * 2
    expected = row + 2 * packed_bytes(16, 32, scheme, 2) + packed_bytes(32, 16, scheme, 2)
    assert bits.expert_bytes(info, 16, 4) == expected
    assert bits.expert_bytes(info, 8, 4) < 0.6 * expected


def test_biases_stay_as_they_are() -> None:
    [layer, *_] = moe_layers(tiny_model("gpt_oss"))
    bits = Bits((4,))
    plain = 2 * packed_bytes(16, 32, Scheme(4), 4) + packed_bytes(32, 16, Scheme(4), 4)
    row = layer.info.expert_bytes - 16 * layer.info.neuron_bytes
    assert bits.expert_bytes(layer.info, 16, 4) == row + 16 * 2 * 4 + plain


def test_groups_must_divide_what_they_share() -> None:
    info = LayerInfo(0, "x", 4, 1, 32, expert_width=16)
    assert Bits((4,), 8).fits(info, 16, 4) and not Bits((4,), 8).fits(info, 12, 4)
    assert Bits((4,), 8).fits(info, 12, WHOLE) and Bits((4,)).fits(info, 13, 4)


def test_experts_of_another_size_are_refused() -> None:
    info = LayerInfo(0, "x", 4, 1, 100, expert_width=4, neuron_parameters=96, neuron_bytes=192)
    with pytest.raises(UserError, match=r"ratio\.bits=null"):
        Bits((4,)).expert_bytes(info, 4, 4)
