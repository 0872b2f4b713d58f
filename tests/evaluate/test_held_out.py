"""The pass over held-out text: its divergence, and what it says of the routers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from families import tiny_model

from moe_lab.data.tokens import Tokens
from moe_lab.evaluate.dense_predictions import DensePredictions
from moe_lab.evaluate.held_out import HeldOut, compare_held_out, perplexity
from moe_lab.models import routers
from moe_lab.models.activations import Activations
from moe_lab.models.checkpoint import Model
from moe_lab.models.layers import moe_layers
from moe_lab.types import NotFinite

SAMPLES = tuple(tuple(range(3 + number, 9 + 3 * number)) for number in range(5))
TOKENS = Tokens(SAMPLES, pad_id=0)


def compare(
    dense: Model,
    model: Model,
    batches: Sequence[dict[str, torch.Tensor]],
    documents: Sequence[int] | None = None,
) -> HeldOut:
    said = DensePredictions(dense, batches, Activations(2**30))
    return compare_held_out(model, batches, said, documents)


def router_inputs(model: Any) -> list[torch.Tensor]:
    """What each router saw [T, D], one sample at a time, so that there is no padding."""
    seen: dict[int, list[torch.Tensor]] = {}
    layers = moe_layers(model)
    handles = [
        layer.router.register_forward_pre_hook(
            lambda module, args, index=index: seen.setdefault(index, []).append(
                args[0].reshape(-1, args[0].shape[-1])
            )
        )
        for index, layer in enumerate(layers)
    ]
    with torch.no_grad():
        for sample in SAMPLES:
            model(torch.tensor([sample]))
    for handle in handles:
        handle.remove()
    return [torch.cat(seen[index]).double() for index in range(len(layers))]


@pytest.mark.parametrize(
    ("family", "top_k"), [("qwen2_moe", 3), ("mixtral", 2), ("mixtral", 1), ("deepseek_v3", 2)]
)
@torch.no_grad()
def test_routing_equals_an_independent_router(family: str, top_k: int) -> None:
    model = tiny_model(family)
    routers.set_top_k(model, top_k)
    found = compare_held_out(model, TOKENS.batches(2))
    entropies, shares, counts = [], [], []
    for layer, x_TD in zip(moe_layers(model), router_inputs(model), strict=True):
        logits_TE = x_TD @ layer.router.weight.double().T
        score_TE = logits_TE.sigmoid() if family == "deepseek_v3" else logits_TE.softmax(dim=1)
        p_TE = score_TE / score_TE.sum(dim=1, keepdim=True)
        entropies.append(-(p_TE * p_TE.log()).sum(dim=1).mean())
        choice_TE = score_TE.clone()
        if family == "deepseek_v3":  # of two groups of four experts, the better one alone is used
            choice_TE += layer.router.e_score_correction_bias.double()
            other_T = choice_TE.view(-1, 2, 4).topk(2).values.sum(dim=2).argmin(dim=1)
            choice_TE.view(-1, 2, 4)[torch.arange(len(other_T)), other_T] = 0
        index_TK = choice_TE.topk(top_k).indices
        weight_TK, order_TK = score_TE.gather(1, index_TK).sort(dim=1, descending=True)
        index_TK = index_TK.gather(1, order_TK)
        shares.append((weight_TK / weight_TK.sum(dim=1, keepdim=True)).mean(dim=0))
        counts.append([index_T.bincount(minlength=8).tolist() for index_T in index_TK.T])
    figures = found.figures
    assert figures["routing/entropy"] == pytest.approx(float(torch.stack(entropies).mean()), 1e-5)
    assert figures["routing/top_k"] == top_k
    expected = torch.stack(shares).mean(dim=0).tolist()
    names = [f"routing/weight_{rank + 1}" for rank in range(top_k)]
    assert [figures[name] for name in names] == pytest.approx(expected, 1e-5)
    assert f"routing/weight_{top_k + 1}" not in figures
    assert found.routed["layers"] == [layer.info.index for layer in moe_layers(model)]
    assert found.routed["rank_count"] == counts


@torch.no_grad()
def test_divergence_and_perplexity_are_means_over_positions_with_a_next_token() -> None:
    """Each sample alone, in float64, from the definitions."""
    dense, model = tiny_model("mixtral"), tiny_model("mixtral")
    model.lm_head.weight.mul_(1.5)
    divergences, losses = [], []
    for sample in SAMPLES:
        p, q = (
            one(torch.tensor([sample])).logits[0].double().softmax(dim=-1) for one in (dense, model)
        )
        for at, target in enumerate(sample[1:]):
            divergences.append(float((p[at] * (p[at] / q[at]).log()).sum()))
            losses.append(-math.log(float(q[at, target])))
    found = compare(dense, model, TOKENS.batches(2)).figures
    assert found["kl"] == pytest.approx(sum(divergences) / len(divergences), rel=1e-4)
    perplexity = math.exp(sum(losses) / len(losses))
    assert found["held_out/perplexity"] == pytest.approx(perplexity, rel=1e-5)


def test_figures_do_not_depend_on_batches_and_nothing_stays_behind() -> None:
    dense, model = tiny_model("mixtral"), tiny_model("mixtral")
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    one, four = (compare(dense, model, TOKENS.batches(size)) for size in (1, 4))
    assert one.routed == four.routed
    assert one.figures == pytest.approx(four.figures, 1e-5)
    assert one.figures["kl"] > 1e-3
    assert compare_held_out(dense, TOKENS.batches(4)).figures["kl"] == 0
    assert not any(layer.router._forward_hooks for layer in moe_layers(model))


def test_a_model_without_routers_has_no_routing() -> None:
    model = tiny_model("qwen2_moe", mlp_only_layers=[0, 1, 2, 3])
    found = compare_held_out(model, TOKENS.batches(4))
    assert set(found.figures) == {"held_out/perplexity", "kl"}
    assert found.routed == {"layers": [], "rank_count": []}


@torch.no_grad()
def test_a_prediction_that_is_none_names_its_document() -> None:
    """By its number in the text, though batches hold the short ones first; dense and variant."""
    samples = ((5, 6, 7, 8, 9, 10), (11, 12), (13, 14, 15), (16, 17, 18, 19))
    tokens = Tokens(samples, pad_id=0)
    model, dense = tiny_model("mixtral"), tiny_model("mixtral")
    compare(dense, model, tokens.batches(2))
    for broken in (model, dense):
        weight = broken.model.embed_tokens.weight
        before = weight[17].clone()
        weight[17] = math.nan
        with pytest.raises(NotFinite, match="document 3 of the held-out text are not finite"):
            compare(dense, model, tokens.batches(2), tokens.positions_by_length())
        with pytest.raises(NotFinite, match="document 2 of"):  # in the order of the batches
            compare(dense, model, tokens.batches(3))
        weight[17] = before


def test_a_loss_of_which_no_perplexity_can_be_told() -> None:
    assert perplexity(2.0) == math.exp(2.0)
    with pytest.raises(NotFinite, match="loss is 800 nats per token"):
        perplexity(800.0)
