"""Routers: restricted, masked, with another number of experts, and their scoring."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from expert_sets import LAYER, Case, some_sets
from families import FAMILIES, tiny_batch, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from moe_lab.models import routers
from moe_lab.models import routers as model_routers
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.editing import prune_layer
from moe_lab.models.layers import moe_layers
from moe_lab.models.routers import SCORINGS, matching_scoring
from moe_lab.types import UserError


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("renormalised", [True, False])
@pytest.mark.parametrize("top_k", [1, 3])
def test_the_routers_scoring_is_recognised(scoring: str, renormalised: bool, top_k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 8, generator=generator)
    weight, index = SCORINGS[scoring](logits).topk(top_k)
    if renormalised and top_k > 1:
        weight = weight / weight.sum(dim=1, keepdim=True)
    assert matching_scoring(logits, index, 2.5 * weight) == scoring
    assert matching_scoring(logits, index, weight.flip(0)) is None


def test_masking_a_router_is_restricting_it(case: Case) -> None:
    layer = {layer.info.index: layer for layer in moe_layers(case.model)}[LAYER]
    x_TD = case.inputs(LAYER)
    before = [part.clone() for part in layer.router(x_TD)]
    for kept in some_sets(case, LAYER):
        with routers.restricted_layer(layer, kept):
            _, weight, index = layer.router(x_TD)
        with routers.masked_layer(layer, kept):
            _, masked_weight, masked_index = layer.router(x_TD)
        order, masked_order = index.argsort(dim=1), masked_index.argsort(dim=1)
        assert torch.equal(index.gather(1, order), masked_index.gather(1, masked_order))
        torch.testing.assert_close(
            weight.gather(1, order), masked_weight.gather(1, masked_order), rtol=1e-6, atol=1e-9
        )
    assert all(torch.equal(a, b) for a, b in zip(before, layer.router(x_TD), strict=True))


def test_a_router_that_cannot_be_masked_is_refused() -> None:
    layer = moe_layers(tiny_model("mixtral"))[0]
    weight = layer.router.weight
    own = lambda x: (x @ weight.T, torch.ones(len(x), 2), torch.zeros(len(x), 2).long())  # noqa: E731
    layer.router.forward = own
    with pytest.raises(UserError, match="cannot be masked"), routers.masked_layer(layer, [0, 1]):
        layer.router(torch.zeros(3, 32))


@pytest.mark.parametrize("family", FAMILIES)
def test_restricted_is_pruned_and_leaves_nothing_behind(family: str) -> None:
    model, batch = tiny_model(family), tiny_batch()
    intact = model(**batch).logits
    kept = {layer.info.index: (0, 2, 3, 4, 6, 7) for layer in moe_layers(model)}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    heard: list[int] = []
    first = moe_layers(model)[0].router
    handle = first.register_forward_hook(lambda *call: heard.append(int(call[2][2].max())))
    with model_routers.restricted(model, kept):
        found = model(**batch).logits
    handle.remove()
    assert heard == [7]  # once, and by the experts' own numbers
    assert torch.equal(model(**batch).logits, intact)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    for layer in moe_layers(model):
        prune_layer(layer, kept[layer.info.index])
    assert torch.equal(model(**batch).logits, found)
    assert not torch.allclose(found, intact)


@pytest.mark.parametrize("family", FAMILIES)
def test_another_number_of_experts_is_another_config(family: str, tmp_path: Path) -> None:
    """Set on a loaded model, saved, and read again by stock transformers, all three agree."""
    model, batch = tiny_model(family), tiny_batch()
    model.save_pretrained(tmp_path / "model")
    before = model(**batch).logits
    model_routers.set_top_k(model, 1)
    found = model(**batch).logits
    assert not torch.allclose(found, before)
    assert {layer.info.top_k for layer in moe_layers(model)} == {1}
    checkpoint = Checkpoint(tmp_path / "model", top_k=1)
    assert checkpoint.fingerprint != Checkpoint(tmp_path / "model").fingerprint
    assert torch.equal(checkpoint.load()(**batch).logits, found)
    model.save_pretrained(tmp_path / "one")
    assert AutoConfig.from_pretrained(tmp_path / "one").num_experts_per_tok == 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "one").eval()
    assert torch.equal(again(**batch).logits, found)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("top_k", [1, 2])
def test_the_scoring_is_known_whatever_k_is(family: str, top_k: int) -> None:
    model = tiny_model(family)
    model_routers.set_top_k(model, top_k)
    expected = "sigmoid" if family in ("deepseek_v3", "glm4_moe") else "softmax"
    assert {model_routers.scoring(layer) for layer in moe_layers(model)} == {expected}
    assert {layer.info.top_k for layer in moe_layers(model)} == {top_k}


def test_layers_that_differ_have_their_own_number_again() -> None:
    model = tiny_model("qwen2_moe")
    for layer, number in zip(moe_layers(model), (1, 2, 3), strict=True):
        routers.set_top_k_of(layer, number)
    with routers.at_top_k(model, 2):
        assert {layer.info.top_k for layer in moe_layers(model)} == {2}
    assert [layer.info.top_k for layer in moe_layers(model)] == [1, 2, 3]
    assert model.config.num_experts_per_tok == 3
