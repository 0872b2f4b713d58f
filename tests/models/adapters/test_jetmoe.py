"""JetMoE: the experts of its attention stay as they are."""

from __future__ import annotations

import pytest
import torch
from families import logits_of
from odd_families import odd_model
from transformers.models.jetmoe.modeling_jetmoe import JetMoeTopKGating

from moe_lab.models.edits.plan import Plan, apply_plan
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.models.forms import choose_form
from moe_lab.models.layers import moe_layers
from moe_lab.models.routers import set_top_k
from moe_lab.types import UserError


def test_attention_is_not_adapted_and_keeps_its_experts() -> None:
    model = odd_model("jetmoe")
    infos = [layer.info for layer in moe_layers(model)]
    attention = model.get_submodule("model.layers.0.self_attention.experts")
    assert type(attention.router) is JetMoeTopKGating
    edits = tuple(PruneExperts(info.index, info.name, kept=(0, 2, 3, 5)) for info in infos)
    apply_plan(model, Plan(edits))
    assert attention.input_linear.weight.shape[0] == attention.router.num_experts == 8
    assert model.get_parameter("model.layers.0.mlp.input_linear.weight").shape[0] == 4
    form = choose_form(model, 0.01)
    assert not form.stock and "self_attention.experts" in form.reason
    assert form.config.num_local_experts == 8


def test_experts_own_no_parameter_and_a_copy_has_its_own() -> None:
    layer = moe_layers(odd_model("jetmoe"))[0]
    assert list(layer.experts.parameters()) == []
    assert layer.experts.down_proj is layer.block.get_parameter("output_linear.weight")
    assert "adds a bias" in (layer.info.obstacle or "")


def test_another_top_k_is_refused() -> None:
    with pytest.raises(UserError, match=r"top_k=1: .*attention"):
        set_top_k(odd_model("jetmoe"), 1)


def test_the_logits_that_transformers_records_are_as_before() -> None:
    model = odd_model("jetmoe")
    ids = torch.tensor([[3, 5, 7, 9]])
    before = model(input_ids=ids, output_router_logits=True).router_logits
    moe_layers(model)
    after = model(input_ids=ids, output_router_logits=True).router_logits
    assert len(before) == len(after) > 4
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert logits_of(model).isfinite().all()
