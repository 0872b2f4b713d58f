"""Experts by whole arrays, forward and back, against the families' own loop."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from families import EACH_FAMILY, tiny_batch, tiny_model
from host_reads import host_reads
from odd_families import odd_model
from stand_ins import saved
from torch import Tensor

from moe_lab.finetune.tuning import next_token_loss
from moe_lab.models import grouped
from moe_lab.models.checkpoint import Model, load
from moe_lab.models.grouped import GROUPED_EXPERTS, WIDENED, in_one_call, widen_but_experts
from moe_lab.models.layers import moe_layers
from moe_lab.models.observing import OBSERVING


def gradients(model: Model, implementation: str) -> dict[str, Tensor]:
    """Of the loss, with its own value, by parameter."""
    model.set_experts_implementation(implementation)
    model.zero_grad()
    batch = tiny_batch()
    loss = next_token_loss(model, batch | {"labels": batch["input_ids"]})
    loss.backward()
    found = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    return found | {"loss": loss.detach()}


def check(model: Model, reference: str = "eager") -> None:
    expected, found = gradients(model, reference), gradients(model, GROUPED_EXPERTS)
    assert found.keys() == expected.keys() and any("experts" in name for name in found)
    for name, gradient in expected.items():
        size = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * size, msg=name)


@pytest.fixture(params=["each expert", "one call"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways: of the second torch has a kernel on a GPU, and on the processor the same call."""
    monkeypatch.setattr(grouped, "in_one_call", lambda *_: request.param == "one call")
    return str(request.param)


@EACH_FAMILY
def test_losses_and_gradients_are_the_family_s(family: str, products: str) -> None:
    check(tiny_model(family))


def test_products_in_one_call_have_nobody_wait_for_a_gpu(products: str) -> None:
    model = tiny_model("mixtral")
    layer = moe_layers(model)[0]
    number, size = layer.info.num_experts, layer.info.hidden_size
    model.set_experts_implementation(GROUPED_EXPERTS)
    hidden = torch.randn(6, size, requires_grad=True)
    index = torch.tensor([[0, 1], [1, 2], [2, number], [0, number], [1, 0], [2, 1]])
    with host_reads() as reads:
        layer.experts(hidden, index, torch.rand(6, 2)).sum().backward()
    assert reads.number == (0 if products == "one call" else 1)


@pytest.mark.parametrize(
    ("dtype", "width", "fits"),
    [("bfloat16", 8, True), ("bfloat16", 12, False), ("float32", 8, False)],
)
def test_one_call_is_for_what_torch_has_a_kernel_for(dtype: str, width: int, fits: bool) -> None:
    x, weight = mock.Mock(is_cuda=True, dtype=getattr(torch, dtype)), torch.zeros(2, 16, width)
    x.element_size.return_value = x.dtype.itemsize
    assert in_one_call(x, weight) is fits
    assert not in_one_call(torch.zeros(3, 16, dtype=x.dtype), weight)


def test_weights_may_stand_inside_the_experts() -> None:
    check(odd_model("llama4_text"), OBSERVING)


def test_nobody_s_pairs_add_nothing(tmp_path: Path, products: str) -> None:
    """Router rows that lead to constants in the place of experts."""
    saved("qwen2_moe", tmp_path / "x")
    model = load(tmp_path / "x" / "model")
    assert any(hasattr(layer.experts, "place_E") for layer in moe_layers(model))
    check(model)


def test_frozen_experts_get_no_gradient(products: str) -> None:
    model = tiny_model("mixtral")
    expected = gradients(model, "eager")
    for layer in moe_layers(model):
        layer.experts.requires_grad_(False)
    found = gradients(model, GROUPED_EXPERTS)
    name = "model.layers.1.mlp.gate.weight"
    assert not any("experts" in key for key in found)
    torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)


def test_autocast_computes_in_its_dtype() -> None:
    model = tiny_model("mixtral")
    with torch.autocast("cpu", torch.bfloat16):
        half, expected = (gradients(model, one)["loss"] for one in (GROUPED_EXPERTS, OBSERVING))
    assert float(half) == pytest.approx(float(expected), rel=2e-3)
    assert float(half) != float(gradients(model, GROUPED_EXPERTS)["loss"])


@EACH_FAMILY
def test_frozen_experts_stay_narrow_and_nothing_changes(family: str) -> None:
    """As a model all in float32, to the bit; and most of its weights in half of the room."""
    found, sizes = [], []
    for widen in (lambda model: model.float(), widen_but_experts):
        model = tiny_model(family).to(torch.bfloat16)
        for layer in moe_layers(model):
            for parameter in layer.experts.parameters():
                parameter.requires_grad_(False)
        for layer in moe_layers(model)[1:]:  # and some that train
            for name in WIDENED:
                if name in dict(layer.experts.named_parameters()):
                    layer.experts.get_parameter(name).requires_grad_(True)
        widen(model)
        sizes.append(sum(one.nbytes for one in moe_layers(model)[0].experts.parameters()))
        found.append(gradients(model, GROUPED_EXPERTS))
    assert sizes[1] < 0.55 * sizes[0]
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name
