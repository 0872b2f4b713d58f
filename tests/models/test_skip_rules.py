"""The rules that leave out experts, against loops written from their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from families import tiny_model
from torch import Tensor

from moe_lab.models.layers import moe_layers
from moe_lab.models.skip_rules import Skipping, distribution, rule_of
from moe_lab.models.skipping import skip
from moe_lab.types import UserError

TOKENS, EXPERTS, TOP_K = 40, 10, 4


def routed(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, weights and choices of a softmax router; the choices in no order."""
    generator = torch.Generator().manual_seed(seed)
    logits_TE = 2 * torch.randn(TOKENS, EXPERTS, generator=generator)
    index_TK = logits_TE.topk(TOP_K).indices
    order_TK = torch.rand(TOKENS, TOP_K, generator=generator).argsort(dim=1)
    index_TK = index_TK.gather(1, order_TK)
    return logits_TE, logits_TE.softmax(dim=1).gather(1, index_TK), index_TK


def stays(rule: str, value: float, p: list[float], chosen: list[int]) -> set[int]:
    """Which experts of one token stay, from the formulas."""
    ranked = sorted(chosen, key=lambda expert: -p[expert])
    if rule == "ratio":
        return {e for e in ranked if not p[e] < value * p[ranked[0]]}
    if rule == "weight":
        return {e for e in ranked if not p[e] < value} | {ranked[0]}
    if rule == "first":
        return set(ranked[: int(value)])
    if rule == "entropy":
        entropy = -sum(one * math.log(one) for one in p) / math.log(len(p))
        return set(ranked[: int(value) + math.ceil(entropy * (len(ranked) - value))])
    for number in range(1, len(ranked) + 1):
        if sum(p[e] for e in ranked[:number]) >= value:
            return set(ranked[:number])
    return set(ranked)


@pytest.mark.parametrize(
    ("rule", "values"),
    [
        ("weight", (0.05, 0.3)),
        ("ratio", (0.0, 0.3, 1.0)),
        ("first", (1, 2, 4)),
        ("entropy", (1, 2)),
        ("top_p", (0.2, 0.7)),
    ],
)
@pytest.mark.parametrize("renormalize", [True, False])
def test_every_rule_is_its_formula(rule: str, values: tuple[float, ...], renormalize: bool) -> None:
    logits_TE, weight_TK, index_TK = routed()
    p_TE, seen = logits_TE.double().softmax(dim=1).tolist(), set()
    for value in values:
        found = Skipping(rule, value, renormalize, "softmax")
        weights = found.applied(logits_TE, weight_TK, index_TK)
        rows = zip(weights, weight_TK, index_TK.tolist(), strict=True)
        for row, (given, before, chosen) in enumerate(rows):
            left = stays(rule, value, p_TE[row], chosen)
            seen.add(len(left))
            mask = torch.tensor([expert in left for expert in chosen])
            factor = before.sum() / before[mask].sum() if renormalize else 1.0
            assert torch.allclose(given, before * mask * factor, atol=1e-6)
            assert (given > 0).tolist() == mask.tolist()
    assert len(seen) > 1  # the rule made a difference


def test_a_rule_takes_any_shape_and_keeps_the_dtype() -> None:
    logits_TE, weight_TK, index_TK = routed()
    rule = Skipping("first", 2)
    whole = rule.applied(logits_TE, weight_TK, index_TK)
    parts = rule.applied(
        logits_TE.view(2, 20, EXPERTS), weight_TK.view(2, 20, TOP_K), index_TK.view(2, 20, TOP_K)
    )
    assert torch.equal(parts.reshape(TOKENS, TOP_K), whole)
    half = rule.applied(logits_TE, weight_TK.bfloat16(), index_TK)
    assert half.dtype == torch.bfloat16 and torch.equal(half > 0, whole > 0)


def test_a_token_always_has_an_expert() -> None:
    logits_TE, weight_TK, index_TK = routed()
    equal_TK = torch.ones(TOKENS, TOP_K)
    for rule in (Skipping("ratio", 2.0), Skipping("top_p", 1e-9, True, "sigmoid")):
        assert (rule.kept(logits_TE, weight_TK, index_TK).sum(dim=1) == 1).all()
    assert Skipping("ratio", 1.0).kept(logits_TE, equal_TK, index_TK).all()


def test_shares_of_scores_that_are_no_probabilities() -> None:
    logits_TE = torch.tensor([[0.0, 0.0, 100.0]])
    assert torch.allclose(distribution(logits_TE, "sigmoid"), torch.tensor([[0.25, 0.25, 0.5]]))


def test_what_is_no_rule_is_refused() -> None:
    with pytest.raises(UserError, match=r"a rule 'last' .* ratio, weight, entropy, top_p, first"):
        Skipping("last", 1)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="a rule 'entropy' of the scoring None"):
        Skipping("entropy", 1)


def test_the_rule_of_a_layer() -> None:
    layer = moe_layers(tiny_model("mixtral"))[0]
    assert rule_of(layer) is None
    skip(layer, Skipping("ratio", 0.5))
    assert rule_of(layer) == Skipping("ratio", 0.5)
