"""SCMoE: its formula, its identities, its log-likelihoods and what it refuses."""

from __future__ import annotations

import math

import pytest
import slow_decoding
import torch
from families import FAMILIES, tiny_model

from moe_lab.evaluate.decoding.base import Decoder
from moe_lab.evaluate.decoding.scmoe import SCMoE, contrasted, contrasted_probabilities
from moe_lab.types import LayerInfo, UserError

LOGITS = torch.tensor([[3.0, 2.0, 1.0, -4.0], [0.0, 0.5, 5.0, 2.0]])
WEAK = torch.tensor([[4.0, 1.0, 1.0, 9.0], [1.0, 0.5, 6.0, 1.0]])


def test_the_formula() -> None:
    """log 0.1 = -2.3: of the first row three are valid, of the second only the likeliest."""
    z = contrasted(LOGITS, WEAK, 0.1, 0.5)
    expected = [[2.5, 2.5, 1.0, -math.inf], [-math.inf, -math.inf, 4.5, -math.inf]]
    assert z.tolist() == expected
    every = contrasted(LOGITS, WEAK, 1e-9, 0.5)
    assert torch.equal(every, 1.5 * LOGITS - 0.5 * WEAK)


def everywhere(decoder: Decoder, ids_BL: torch.Tensor) -> torch.Tensor:
    """The decoder's logits [B, L, V]."""
    return decoder.logits(ids_BL, torch.ones_like(ids_BL).bool()).view(*ids_BL.shape, -1)


@pytest.mark.parametrize("family", [*FAMILIES])
def test_without_contrast_or_choice_it_is_greedy(family: str) -> None:
    model = tiny_model(family)
    ids = torch.randint(3, 96, (2, 6), generator=torch.Generator().manual_seed(3))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False}
    given |= {"max_new_tokens": 6, "min_new_tokens": 6}
    greedy, own = model.generate(**given), model(ids).logits.log_softmax(dim=-1)
    texts = []
    for asked in (SCMoE(beta=0.0), SCMoE(alpha=1.0), SCMoE(beta=2.0), SCMoE(weak="random")):
        with asked.opened(model) as decoder, torch.no_grad():
            texts.append(model.generate(**given, custom_generate=decoder.loop))
            logits = everywhere(decoder, ids)
        torch.testing.assert_close(logits.logsumexp(dim=-1), torch.zeros(2, 6), atol=1e-5, rtol=0)
        assert logits.isfinite().all()
        if asked in (SCMoE(beta=0.0), SCMoE(alpha=1.0)):
            torch.testing.assert_close(logits, own, atol=1e-5, rtol=1e-5)
    assert torch.equal(texts[0], greedy) and torch.equal(texts[1], greedy)
    assert not torch.equal(texts[2], greedy)


@pytest.mark.parametrize("family", slow_decoding.FAMILIES)
def test_log_likelihoods_are_the_formula_s(family: str) -> None:
    """Probability moves among valid tokens alone, and the likeliest is what would be generated."""
    model, (alpha, beta, rank) = tiny_model(family), (0.2, 0.7, 3)
    ids = [5, 9, 31, 77, 12]
    with SCMoE(alpha, beta, rank=rank).opened(model) as decoder, torch.no_grad():
        found = everywhere(decoder, torch.tensor([ids]))[0, -1]
    strong = slow_decoding.logits_after(model, ids)
    with slow_decoding.Routed(model, slow_decoding.at_rank(rank)):
        weak = slow_decoding.logits_after(model, ids)
    z, valid = slow_decoding.self_contrast(strong, weak, alpha, beta)
    own = strong.double().softmax(dim=-1)
    among = z.double().softmax(dim=-1)
    expected = own.clone()
    for token in valid:
        expected[token] = own[valid].sum() * among[token]
    assert 1 < len(valid) < len(own)
    torch.testing.assert_close(found.double().exp(), expected, rtol=1e-3, atol=1e-6)
    assert int(found.argmax()) == int(z.argmax())


def test_no_probability_is_none() -> None:
    """Where only one token is valid, all are the strong routing's own."""
    found = contrasted_probabilities(LOGITS, WEAK, 0.1, 0.9)
    assert found.isfinite().all()
    torch.testing.assert_close(found[1], LOGITS[1].log_softmax(dim=-1))


def test_more_experts_for_the_strong_routing() -> None:
    model, ids = tiny_model("mixtral"), torch.tensor([[5, 9, 31]])
    with SCMoE(beta=0.0, strong_top_k=4).opened(model) as decoder, torch.no_grad():
        found = everywhere(decoder, ids)
        with slow_decoding.Routed(model, slow_decoding.first(4)):
            expected = model(ids).logits.log_softmax(dim=-1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_ranks_beyond_the_experts_left_are_refused() -> None:
    layers = [LayerInfo(1, "a", 8, 2, 4), LayerInfo(2, "b", 3, 2, 4)]
    SCMoE(rank=3).check(layers)
    with pytest.raises(
        UserError, match=r"^decoding.rank=4: layer 2 has 3 experts, .* 1 to 3 is possible$"
    ):
        SCMoE(rank=4).check(layers)
    SCMoE(weak="random", rank=4).check(layers)
    with pytest.raises(UserError, match=r"^decoding.strong_top_k=5: layer 2 has 3 experts"):
        SCMoE(strong_top_k=5).check(layers)
    grouped = [LayerInfo(1, "a", 16, 2, 4, groups=4, groups_used=2)]
    with pytest.raises(UserError, match=r"has 16 experts, of which a token can be sent to 8: 1"):
        SCMoE(rank=9).check(grouped)
