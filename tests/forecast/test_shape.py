"""Operations of a forward by shapes, against torch's counter."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, tiny_model
from real_models import REAL, shrunk

from moe_lab.forecast.shape import shape_of
from moe_lab.measure.speed import flops_per_token
from moe_lab.models.architecture import config_of
from moe_lab.models.checkpoint import meta_model
from moe_lab.models.layers import num_parameters
from moe_lab.models.opening import model_class

# A state besides attention: convolutions that begin before the text are counted at their ends.
WITH_STATES = ("granite_4_h_tiny", "lfm2_8b_a1b", "nemotron_3_nano", "qwen3_next_80b_a3b")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [7, 96])
def test_flops_are_those_that_torch_counts(family: str, length: int) -> None:
    model = tiny_model(family)
    assert shape_of(model).flops([length]) == flops_per_token(model, length) * length


@pytest.mark.parametrize("name", WITH_STATES)
def test_states_and_convolutions(name: str) -> None:
    torch.manual_seed(0)
    config = config_of(shrunk(REAL[name]["architecture"], 128))
    model = model_class(config).from_config(config).eval()
    counted = flops_per_token(model, 64) * 64
    assert shape_of(model).flops([64]) == pytest.approx(counted, rel=2e-3)


def test_sequences_attend_to_themselves_alone() -> None:
    shape = shape_of(tiny_model("mixtral"))
    assert shape.flops([5, 9]) == shape.flops([5]) + shape.flops([9])
    assert shape.flops([14]) > shape.flops([5, 9])


def test_the_head_is_left_out() -> None:
    shape = shape_of(tiny_model("mixtral"))
    assert shape.flops([5]) - shape.flops([5], with_head=False) == 5 * 2 * 32 * 96


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_all_counted_once(tied: bool) -> None:
    model = tiny_model("qwen2_moe", tie_word_embeddings=tied)
    shape = shape_of(model)
    assert shape.parameters == num_parameters(model)
    assert shape.head == (0 if tied else 96 * 32)
    assert [one.num_experts for one in shape.decoders] == [0, 8, 8, 8]


def test_no_weights_are_needed() -> None:
    model = tiny_model("deepseek_v3")
    assert shape_of(meta_model(model.config)) == shape_of(model)
