"""How many hidden units each expert has, noted beside zeros in memory."""

from __future__ import annotations

import torch
from families import logits_of, tiny_model
from narrowing import UNEVEN, narrow

from moe_lab.models.hidden_units import HiddenUnits
from moe_lab.models.layers import moe_layers, num_parameters
from moe_lab.models.widths import (
    fill_up,
    first_units,
    is_uneven,
    keep_widths,
    num_zeros,
    set_widths,
    widths_of,
)


def test_widths_are_noted_only_where_they_differ() -> None:
    experts = moe_layers(tiny_model("mixtral"))[0].experts
    assert widths_of(experts) == (16,) * 8 and not is_uneven(experts)
    set_widths(experts, range(9, 17))
    assert widths_of(experts) == tuple(range(9, 17)) and is_uneven(experts)
    set_widths(experts, (16,) * 8)
    assert not is_uneven(experts)


def test_the_first_units_of_each() -> None:
    assert first_units((2, 0), 3).tolist() == [[0, 1, -1], [-1, -1, -1]]


def test_experts_are_filled_up_with_zeros() -> None:
    model = tiny_model("gpt_oss")
    expected = logits_of(model)
    layer = moe_layers(model)[0]
    fill_up(layer.experts, 20)
    assert moe_layers(model)[0].info.expert_width == 20
    assert not HiddenUnits(layer.experts).down_columns()[:, 16:].any()
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-5, atol=1e-5)


def test_what_is_zeros_in_all_that_are_left_goes() -> None:
    model = tiny_model("mixtral")
    narrow(model, UNEVEN)
    experts = moe_layers(model)[0].experts
    keep_widths(experts, (*UNEVEN[:3], *UNEVEN[4:5], 4, 4, 4, 4), range(8))
    assert HiddenUnits(experts).width == 9 and widths_of(experts)[:4] == (0, 5, 9, 1)
    keep_widths(experts, (9,) * 8, range(8))
    assert not is_uneven(experts)


def test_zeros_are_not_counted() -> None:
    model = tiny_model("gpt_oss")
    info, before = moe_layers(model)[0].info, num_parameters(model)
    narrow(model, UNEVEN)
    gone = sum(16 - width for width in UNEVEN) * info.neuron_parameters * 4
    assert num_parameters(model) == before - gone
    zeros = sum(12 - width for width in UNEVEN) * info.neuron_parameters * 4
    assert num_zeros(model) == (zeros, 4 * zeros)
    layer = moe_layers(model)[0].info
    assert layer.model_parameters == before - gone and layer.model_bytes == 4 * (before - gone)
    assert layer.expert_parameters < info.expert_parameters - 4 * info.neuron_parameters
