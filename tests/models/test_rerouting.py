"""Routers asked for other experts than their own, against their family's formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import slow_decoding
import torch
from families import EACH_FAMILY, logits_of, tiny_batch, tiny_model
from torch import Tensor

from moe_lab.models.layers import moe_layers
from moe_lab.models.probing import route
from moe_lab.models.rerouting import (
    AskedRouter,
    Rerouting,
    TokenIds,
    at_rank,
    drawn,
    up_to_share,
    usable_rows,
    with_number,
)
from moe_lab.models.routers import at_top_k, restricted
from moe_lab.models.skipping import skip
from moe_lab.types import UserError

EACH_KIND = pytest.mark.parametrize("family", slow_decoding.FAMILIES)
Choose = Callable[[Any, Tensor, Tensor], Tensor]


def rerouted(model: Any, forward_of: Callable[[AskedRouter], Any]) -> Tensor:
    with Rerouting(model, forward_of).active():
        return logits_of(model)


def by_formula(model: Any, choose: Choose) -> Tensor:
    with slow_decoding.Routed(model, choose):
        return logits_of(model)


@EACH_KIND
def test_ranks_and_numbers_are_the_routers_own(family: str) -> None:
    model = tiny_model(family)
    plain = logits_of(model)
    found = {rank: rerouted(model, lambda ask: at_rank(ask, rank, "x")) for rank in (1, 2, 3, 4)}  # noqa: B023
    for rank, logits in found.items():
        expected = by_formula(model, slow_decoding.at_rank(rank))
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[2], found[3], atol=1e-2)
    for number in (1, 3):
        logits = rerouted(model, lambda ask: with_number(ask, number, "x"))  # noqa: B023
        with at_top_k(model, number):
            assert torch.equal(logits, logits_of(model))
    assert torch.equal(logits_of(model), plain), "as it was"


@EACH_KIND
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
@torch.no_grad()
def test_the_fewest_experts_that_reach_a_share(family: str, share: float) -> None:
    """Each token by itself, as the definition says; those that it does not get weigh nothing."""
    model = tiny_model(family)
    layer = moe_layers(model)[-1]
    x_TD = torch.randn(30, 32, generator=torch.Generator().manual_seed(1))
    ask = AskedRouter(layer)
    _, weight, index = up_to_share(ask, share)(x_TD)
    _, scores, order = slow_decoding.order_of(family, model.config, layer.router, x_TD)
    for token in range(len(x_TD)):
        usable = scores[token, order[token]]
        ranked = sorted(zip((usable / usable.sum()).tolist(), order[token].tolist(), strict=True))
        taken, mass = [], 0.0
        while mass < share:
            probability, expert = ranked.pop()
            mass, taken = mass + probability, [*taken, expert]
        expected = slow_decoding.weight_of(family, model.config, scores[token, taken][None])[0]
        assert index[token, : len(taken)].tolist() == taken
        torch.testing.assert_close(weight[token, : len(taken)], expected, rtol=1e-4, atol=1e-6)
        assert not weight[token, len(taken) :].any()


@EACH_FAMILY
def test_the_whole_share_is_every_expert_and_the_least_is_the_first(family: str) -> None:
    model = tiny_model(family)
    usable = AskedRouter(moe_layers(model)[0]).usable
    whole = rerouted(model, lambda ask: up_to_share(ask, 1.0))
    every = rerouted(model, lambda ask: with_number(ask, usable, "x"))
    torch.testing.assert_close(whole, every, rtol=1e-3, atol=1e-3)
    biased = family in ("deepseek_v3", "glm4_moe")  # the first by bias is another
    least = rerouted(model, lambda ask: up_to_share(ask, 1e-6))
    if not biased:
        with at_top_k(model, 1):
            torch.testing.assert_close(least, logits_of(model), rtol=1e-4, atol=1e-4)


@EACH_FAMILY
def test_a_drawn_expert_depends_on_its_token_alone(family: str) -> None:
    model, batch = tiny_model(family), tiny_batch(padding=False)
    layer, tokens = moe_layers(model)[-1], TokenIds(model)
    ids = batch["input_ids"]

    def experts(seed: int, ids: Tensor) -> Tensor:
        tokens.ids = ids
        x_TD = torch.randn(96, 32, generator=torch.Generator().manual_seed(2))[ids.reshape(-1)]
        forward = drawn(AskedRouter(layer), tokens, 96, seed)
        before, layer.router.forward = layer.router.forward, forward
        index = route(layer, x_TD)[2]
        del layer.router.forward, before
        assert index.shape[1] == 1
        return index.reshape(ids.shape)

    found = experts(0, ids)
    assert torch.equal(experts(0, ids[1:2]), found[1:2])
    assert not torch.equal(experts(1, ids), found)
    often = experts(0, torch.arange(96)[None])
    assert len(often.unique()) == 8 or AskedRouter(layer).usable < 8
    routing = Rerouting(model, lambda ask: drawn(ask, tokens, 96, 0))
    with tokens.watched(), routing.active():
        one, other = logits_of(model, batch), logits_of(model, {"input_ids": ids[1:2]})
    torch.testing.assert_close(one[1:2], other, rtol=1e-4, atol=1e-4)


def test_what_a_router_cannot_do_is_refused() -> None:
    model = tiny_model("deepseek_v3")
    layer = moe_layers(model)[0]
    assert usable_rows(layer.info) == AskedRouter(layer).usable == 4, "one of two groups"
    with pytest.raises(UserError, match=r"^rank=5: a token can be sent to 4 experts of layer 1"):
        at_rank(AskedRouter(layer), 5, "rank=5")
    kept = {layer.info.index: [0, 1, 2] for layer in moe_layers(tiny_model("mixtral"))}
    small = tiny_model("mixtral")
    with restricted(small, kept):
        before = logits_of(small)
        with pytest.raises(UserError, match=r"^rank=4: a token can be sent to 3 experts"):
            Rerouting(small, lambda ask: at_rank(ask, 4, "rank=4"))
        with Rerouting(small, lambda ask: at_rank(ask, 3, "rank=3")).active():
            assert not torch.equal(logits_of(small), before)
        assert torch.equal(logits_of(small), before), "still restricted"

    def stubborn(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x @ layer.router.weight.T, torch.ones(len(x), 2), torch.zeros(len(x), 2).long()

    layer.router.forward = stubborn
    with pytest.raises(UserError, match="cannot be asked for 1 experts of a token"):
        AskedRouter(layer)


def test_a_rule_that_skips_experts_rests_where_there_is_only_one() -> None:
    """But goes on behind another number of the router's own choices."""

    class First:
        def applied(self, logits_TE: Tensor, weight_TK: Tensor, index_TK: Tensor) -> Tensor:
            return weight_TK * (torch.arange(weight_TK.shape[1]) > 0)

    model, plain = tiny_model("mixtral"), tiny_model("mixtral")
    for layer in moe_layers(model):
        skip(layer, First())
    second = rerouted(model, lambda ask: at_rank(ask, 2, "x"))
    assert torch.equal(second, rerouted(plain, lambda ask: at_rank(ask, 2, "x")))
    three = rerouted(model, lambda ask: with_number(ask, 3, "x"))
    assert not torch.equal(three, rerouted(plain, lambda ask: with_number(ask, 3, "x")))
