"""Bytes of experts in few bits."""

from __future__ import annotations

import pytest
import torch
from families import tiny_model

from moe_lab.methods.ratios.bits import UNROUNDED, Bits
from moe_lab.models.expert_matrices import expert_matrices
from moe_lab.models.layers import moe_layers
from moe_lab.models.packing import packed
from moe_lab.models.rounding import Scheme, rounded
from moe_lab.types import LayerInfo, UserError


def packed_bytes(out: int, width: int, scheme: Scheme, dtype: torch.dtype) -> int:
    """Of all parts of a matrix, once it is packed."""
    levels = rounded(torch.randn(out, width).to(dtype), scheme)
    return sum(part.nbytes for part in packed(levels, scheme.bits, own=True).values())


def test_an_expert_takes_what_its_matrices_and_its_router_row_take() -> None:
    [layer, *_] = moe_layers(tiny_model("mixtral").bfloat16())
    info, bits = layer.info, Bits((2, 4, UNROUNDED), 8)
    assert bits.expert_bytes(info, info.expert_width, UNROUNDED) == info.expert_bytes
    shapes = [tuple(one.shape[1:]) for one in expert_matrices(layer.experts).values()]
    assert shapes == [(32, 32), (32, 16)]  # gate and up projection as one
    scheme, row = Scheme(4, 8), 32 * 2
    each = (packed_bytes(*shape, scheme, torch.bfloat16) for shape in [(16, 32)] * 2 + [(32, 16)])
    expected = row + sum(each)
    assert bits.expert_bytes(info, 16, 4) == expected
    assert bits.expert_bytes(info, 8, 4) < 0.75 * expected


def test_biases_stay_as_they_are() -> None:
    [layer, *_] = moe_layers(tiny_model("gpt_oss"))
    bits = Bits((4,))
    each = (packed_bytes(*one, Scheme(4), torch.float32) for one in [(16, 32)] * 2 + [(32, 16)])
    plain = sum(each)
    row = layer.info.expert_bytes - 16 * layer.info.neuron_bytes
    assert bits.expert_bytes(layer.info, 16, 4) == row + 16 * 2 * 4 + plain


def test_groups_must_divide_what_they_share() -> None:
    info = LayerInfo(0, "x", 4, 1, 32, expert_width=16)
    assert Bits((4,), 8).fits(info, 16, 4) and not Bits((4,), 8).fits(info, 12, 4)
    assert Bits((4,), 8).fits(info, 12, UNROUNDED) and Bits((4,)).fits(info, 13, 4)


def test_experts_of_another_size_are_refused() -> None:
    info = LayerInfo(0, "x", 4, 1, 100, expert_width=4, neuron_parameters=96, neuron_bytes=192)
    with pytest.raises(UserError, match=r"ratio\.bits=null"):
        Bits((4,)).expert_bytes(info, 4, 4)
