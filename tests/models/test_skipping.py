"""Routers with a rule: what their model computes, what is seen of it, and what is refused."""

from __future__ import annotations

import pytest
import torch
from families import EACH_FAMILY, FAMILIES, logits_of, tiny_batch, tiny_model
from odd_families import odd_model

from moe_lab.models.editing import replace_experts, share_experts
from moe_lab.models.layers import hidden_of, moe_layers
from moe_lab.models.observing import observe, observe_routers
from moe_lab.models.routers import scoring, set_top_k_of
from moe_lab.models.skip_rules import Skipping
from moe_lab.models.skipping import (
    SkippingExperts,
    check_not_skipping,
    is_skipping,
    none_skipped,
    skip,
)
from moe_lab.profile.layer import LayerStatistics
from moe_lab.types import UserError


def skipped(family: str, rule: Skipping, implementation: str | None = None):
    model = tiny_model(family)
    for layer in moe_layers(model):
        skip(layer, rule)
    if implementation:
        model.set_experts_implementation(implementation)
    return model


@EACH_FAMILY
def test_a_rule_that_leaves_out_nothing_changes_no_bit(family: str) -> None:
    assert torch.equal(
        logits_of(skipped(family, Skipping("ratio", 0.0, False))), logits_of(tiny_model(family))
    )


@EACH_FAMILY
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@torch.no_grad()
def test_a_layer_gives_the_sum_of_what_stays(family: str, implementation: str) -> None:
    """Against the intact block's own router and experts, a token and an expert at a time."""
    intact, model = tiny_model(family), skipped(family, Skipping("ratio", 0.8), implementation)
    layer, own = moe_layers(model)[-1], moe_layers(intact)[-1]
    intact.set_experts_implementation("eager")
    x_TD = torch.randn(9, 32, generator=torch.Generator().manual_seed(3))
    caught: list[tuple[torch.Tensor, ...]] = []
    handle = own.experts.register_forward_pre_hook(lambda module, args: caught.append(args))
    whole_TD = hidden_of(own.block(x_TD[None])).reshape(9, 32)
    handle.remove()
    given_TD, index_TK, weight_TK = caught[0]
    expected_TD, left_out = whole_TD.clone(), 0
    rows = zip(index_TK.tolist(), weight_TK.tolist(), strict=True)
    for token, (chosen, weights) in enumerate(rows):
        stay = [w if w >= 0.8 * max(weights) else 0.0 for w in weights]
        left_out += stay.count(0.0)
        factor = sum(weights) / sum(stay)
        for expert, before, now in zip(chosen, weights, stay, strict=True):
            x_1D = given_TD[token : token + 1]
            ones = torch.ones(1, 1)
            y_D = own.experts(x_1D, torch.tensor([[expert]]), ones)[0]
            expected_TD[token] += (factor * now - before) * y_D
    got_TD = hidden_of(layer.block(x_TD[None])).reshape(9, 32)
    assert left_out > 0
    assert torch.allclose(got_TD, expected_TD, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_what_is_observed_is_what_is_used(family: str) -> None:
    model, batch = skipped(family, Skipping("ratio", 0.8)), tiny_batch()
    valid = batch["attention_mask"].bool()
    seen: dict[int, LayerStatistics] = {}
    whole: dict[int, LayerStatistics] = {}

    def routers(layer, *routed):
        seen.setdefault(layer.info.index, LayerStatistics(layer.info)).add_routed(*routed)

    def experts(info, routing):
        whole.setdefault(info.index, LayerStatistics(info)).add(routing)
        assert len(routing.y_SD) == int((routing.weight_TK > 0).sum())
        assert bool((routing.weight_S > 0).all())

    before = logits_of(model)
    with observe_routers(model, routers, whole=True) as observation:
        observation.valid = valid
        logits_of(model)
    with observe(model, experts) as watched:
        watched.valid = valid
        observed = logits_of(model)
    torch.testing.assert_close(observed, before, rtol=1e-5, atol=1e-5)
    for index, statistics in seen.items():
        slots = float(statistics["tokens"]) * FAMILIES[family]["num_experts_per_tok"]
        assert float(statistics["tokens"]) <= float(statistics["count"].sum()) < slots
        assert torch.equal(statistics["count"], whole[index]["count"])
        assert torch.allclose(statistics["gate_sum"], whole[index]["gate_sum"])
        assert statistics.scoring == ("sigmoid" if family == "deepseek_v3" else "softmax")


def test_the_scoring_is_found_behind_a_rule() -> None:
    layer = moe_layers(skipped("deepseek_v3", Skipping("first", 1)))[0]
    assert scoring(layer) == "sigmoid"


def test_generation_with_a_cache_is_generation_without() -> None:
    model = skipped("mixtral", Skipping("ratio", 0.7))
    ids = tiny_batch(padding=False)["input_ids"]
    with torch.no_grad():
        cached, plain = (
            model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=use)
            for use in (True, False)
        )
    assert torch.equal(cached, plain)
    assert cached.shape[1] == ids.shape[1] + 6


def test_while_it_rests_nothing_is_left_out() -> None:
    model = skipped("mixtral", Skipping("first", 1))
    with none_skipped(model):
        assert torch.equal(logits_of(model), logits_of(tiny_model("mixtral")))
    assert not torch.equal(logits_of(model), logits_of(tiny_model("mixtral")))


def test_families_with_an_adapter() -> None:
    for family in ("jetmoe", "dbrx"):
        model = odd_model(family)
        before = logits_of(model)
        for layer in moe_layers(model):
            skip(layer, Skipping("ratio", 0.0))
        assert torch.allclose(logits_of(model), before, atol=1e-5)
        for layer in moe_layers(model):
            skip(layer, Skipping("first", 1, True))
        first = logits_of(model)
        for layer in moe_layers(model):  # both renormalise by themselves
            set_top_k_of(layer, 1)
        with none_skipped(model):
            assert torch.allclose(logits_of(model), first, atol=1e-4)
        assert not torch.allclose(first, before, atol=1e-2)


@pytest.mark.parametrize(
    ("family", "why"),
    [("llama4_text", "chooses 1 expert"), ("longcat_flash", "zero experts")],
)
def test_families_without_anything_to_skip_are_refused(family: str, why: str) -> None:
    layer = moe_layers(odd_model(family))[0]
    with pytest.raises(UserError, match=why):
        skip(layer, Skipping("ratio", 0.5))
    assert not is_skipping(layer) and not isinstance(layer.experts, SkippingExperts)


def test_rows_cannot_lead_elsewhere_before_or_behind_a_rule() -> None:
    layer = moe_layers(tiny_model("mixtral"))[0]
    check_not_skipping(layer)
    skip(layer, Skipping("ratio", 0.5))
    with pytest.raises(UserError, match="a rule leaves out some of a token's experts"):
        replace_experts(layer, [0, 1, 2], "zero")
    with pytest.raises(UserError, match="a rule leaves out some of a token's experts"):
        share_experts(layer, [0, 1], [[0, 2, 3, 4], [1, 5, 6, 7]])
    model = tiny_model("mixtral")
    replace_experts(moe_layers(model)[0], [0, 1, 2], "zero")
    with pytest.raises(UserError, match="rows of its router lead to no expert of their own"):
        skip(moe_layers(model)[0], Skipping("ratio", 0.5))
