"""Experts in factors in a layer's block, against the block of the family."""

from __future__ import annotations

import copy

import pytest
import torch
from factorized import full_rank_plan
from families import FAMILIES, logits_of, tiny_model
from odd_families import odd_model

from moe_lab.measure.speed import active_parameters, parameters
from moe_lab.models.edits.plan import apply_plan, restructure_model
from moe_lab.models.factorized import (
    FactorizedExperts,
    factorized_in,
    idle_parameters,
    matrix_shapes,
    obstacle_to_factors,
    put_factors,
    stacked,
)
from moe_lab.models.layers import moe_layers
from moe_lab.types import UserError

PLAIN = [family for family in FAMILIES if family != "gpt_oss"]
# (name, experts, outputs, inputs) of a rank 4 in each matrix of the tiny families.
LOW = {"kind": "low_rank", "rank": 4, "shared": None, "base": None}


def in_float64(family: str):
    model = tiny_model(family).double()
    model.set_experts_implementation("eager")
    return model


@pytest.mark.parametrize("family", PLAIN)
def test_full_rank_is_the_identity(family: str) -> None:
    model = in_float64(family)
    plan, before = full_rank_plan(model), logits_of(model)
    blocks = [copy.deepcopy(layer.block) for layer in moe_layers(model)]
    names = [layer.info.name for layer in moe_layers(model)]
    apply_plan(model, plan)
    assert not moe_layers(model)
    torch.testing.assert_close(logits_of(model), before, rtol=1e-5, atol=1e-5)
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    for name, block in zip(names, blocks, strict=True):  # without the norms' float32 between
        ours, theirs = model.get_submodule(name)(x), block(x)
        ours, theirs = (one[0] if isinstance(one, tuple) else one for one in (ours, theirs))
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_an_index_behind_the_experts_is_nobodys() -> None:
    model = tiny_model("mixtral")
    layer = moe_layers(model)[0]
    experts = put_factors(layer, dict.fromkeys(("gate", "up", "down"), LOW))
    for parameter in experts.parameters():
        parameter.data.normal_()
    x, weight = torch.randn(3, 32), torch.ones(3, 2)
    nobody = torch.full((3, 2), 8)
    assert not experts(x, nobody, weight).any()
    one = torch.tensor([[1, 8], [8, 2], [8, 8]])
    first = experts(x[:1], one[:1, :1], weight[:1, :1])
    second = experts(x[1:2], one[1:2, 1:], weight[1:2, 1:])
    alone = torch.cat([first, second, torch.zeros(1, 32)])
    torch.testing.assert_close(experts(x, one, weight), alone)


def test_what_a_token_uses_is_counted() -> None:
    model = tiny_model("qwen2_moe")  # 3 of 8 experts, of 3 * 32 * 16 parameters, in 3 layers
    whole, active = parameters(model), active_parameters(model)
    for layer in moe_layers(model):
        put_factors(layer, dict.fromkeys(("gate", "up", "down"), LOW))
    each, left = 3 * 32 * 16, 3 * 4 * (32 + 16)
    assert parameters(model) == whole - 3 * 8 * (each - left)
    assert active_parameters(model) == active - 3 * 3 * (each - left)
    assert idle_parameters(model) == 3 * (8 - 3) * left


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("gpt_oss", "GptOssExperts has biases"),
        ("llama4_text", "computes in a way of its own"),
        ("jetmoe", "computes in a way of its own"),
        ("longcat_flash", "more rows than there are experts"),
    ],
)
def test_experts_that_are_no_plain_gated_mlp_are_refused(family: str, why: str) -> None:
    model = tiny_model(family) if family in FAMILIES else odd_model(family)
    layer = moe_layers(model)[0]
    assert why in str(obstacle_to_factors(layer))
    with pytest.raises(UserError, match=rf"layer {layer.info.index} cannot be factorised.*{why}"):
        put_factors(layer, dict.fromkeys(("gate", "up", "down"), LOW))


def test_the_shapes_are_there_without_weights() -> None:
    model = in_float64("deepseek_v3").to("meta")
    plan = full_rank_plan(in_float64("deepseek_v3"))
    restructure_model(model, plan.edits)
    found = [factorized_in(module) for module in model.modules()]
    experts = [one for one in found if one is not None]
    assert len(experts) == 3 and all(isinstance(one, FactorizedExperts) for one in experts)
    assert experts[0].gate_factors.left.is_meta


def test_the_matrices_are_views_of_the_familys_tensors() -> None:
    layer = moe_layers(tiny_model("qwen3_moe"))[0]
    assert matrix_shapes(layer) == {"gate": (8, 16, 32), "up": (8, 16, 32), "down": (8, 32, 16)}
    gate, up, down = stacked(layer.experts).values()
    x = torch.randn(1, 32)
    one, weight = torch.tensor([[3]]), torch.ones(1, 1)
    h = layer.experts.act_fn(x @ gate[3].T) * (x @ up[3].T)
    torch.testing.assert_close(layer.experts(x, one, weight), h @ down[3].T)
