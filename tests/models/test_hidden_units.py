"""Where hidden units lie: cutting, silencing and ordering them, in every layout."""

from __future__ import annotations

import pytest
import torch
from families import EACH_FAMILY, FAMILIES, logits_of, tiny_model
from odd_families import ADAPTED, odd_model

from moe_lab.models.hidden_units import HiddenUnits, unit_parameters
from moe_lab.models.layers import moe_layers
from moe_lab.models.widths import first_units

EVERY = [*FAMILIES, *ADAPTED]


def model_of(family: str) -> torch.nn.Module:
    model = odd_model(family) if family in ADAPTED else tiny_model(family)
    moe_layers(model)  # which lets adapters compute
    return model


@pytest.mark.parametrize("family", EVERY)
def test_keeping_all_is_the_identity(family: str) -> None:
    model = model_of(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = logits_of(model)
    for layer in moe_layers(model):
        width, number = layer.info.expert_width, len(layer.experts.down_proj)
        HiddenUnits(layer.experts).keep(torch.arange(width).expand(number, width))
    unused = {"longcat_flash"}  # rows of zero experts, which nobody reads
    for name, tensor in model.state_dict().items():
        rows = slice(0, 8) if family in unused and name.endswith("gate_up_proj") else slice(None)
        assert torch.equal(tensor[rows], before[name][rows]), name
    assert torch.equal(logits_of(model), expected)


@pytest.mark.parametrize("family", EVERY)
def test_a_unit_whose_down_column_is_zero_may_go(family: str) -> None:
    model = model_of(family)
    layers = moe_layers(model)
    for layer in layers:
        columns_EID = HiddenUnits(layer.experts).down_columns()
        with torch.no_grad():
            columns_EID[:, [2, 5, 6, 11]] = 0.0
    expected = logits_of(model)
    for layer in layers:
        kept = [unit for unit in range(layer.info.expert_width) if unit not in (2, 5, 6, 11)]
        units = HiddenUnits(layer.experts)
        units.keep(torch.tensor(kept).expand(len(layer.experts.down_proj), -1))
        assert HiddenUnits(layer.experts).width == units.width - 4
    # DBRX carries the rounding of other sums through its router: 2e-4 of 5 on an Intel processor.
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-5, atol=3e-4)


@pytest.mark.parametrize("family", EVERY)
def test_a_unit_of_zeros_computes_nothing_and_gets_no_gradient(family: str) -> None:
    model = model_of(family)
    expected = logits_of(model)
    layers = moe_layers(model)
    for layer in layers:
        width, number = layer.info.expert_width, len(layer.experts.down_proj)
        HiddenUnits(layer.experts).keep(first_units((width,) * number, width + 4))
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-5, atol=3e-4)
    ids = torch.tensor([[3, 5, 7, 9, 11, 13]])
    for layer in layers:
        for parameter in unit_parameters(layer.experts).values():
            parameter.requires_grad_(True)
    model(input_ids=ids).logits.square().sum().backward()
    for layer in layers:
        units = HiddenUnits(layer.experts)
        for name, parameter in unit_parameters(layer.experts).items():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
            shape, (axis, place_IN) = units.tensors[name].shape, units.places[name]
            rows = parameter.grad.reshape(-1, *shape[1:])[: shape[0]]
            of_zeros = rows.movedim(axis + 1, 0)[place_IN[-4:].flatten()]
            assert not of_zeros.any(), name


@EACH_FAMILY
def test_another_order_is_the_same_function(family: str) -> None:
    model = tiny_model(family)
    expected = logits_of(model)
    layer = moe_layers(model)[0]
    width = layer.info.expert_width
    order_EI = torch.stack([torch.randperm(width) for _ in range(8)])
    before = HiddenUnits(layer.experts).weights(3)
    HiddenUnits(layer.experts).keep(order_EI)
    assert torch.equal(HiddenUnits(layer.experts).weights(3), before[order_EI[3]])
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-5, atol=1e-5)


def test_parameters_are_those_of_the_model() -> None:
    for family in EVERY:
        model = model_of(family)
        known = {id(parameter) for parameter in model.parameters()}
        for layer in moe_layers(model):
            found = unit_parameters(layer.experts)
            assert found and all(id(parameter) in known for parameter in found.values()), family
