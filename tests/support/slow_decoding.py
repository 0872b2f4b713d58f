"""Decoding as the papers' formulas say, token by token: whole texts, no caches, no padding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_lab.models.layers import moe_layers

# Renormalised softmax; softmax as it is, a dense first layer; sigmoid in groups with a bias and a
# scaling factor, a dense first layer.
FAMILIES = ("mixtral", "qwen2_moe", "deepseek_v3")
Routing = tuple[Tensor, Tensor, Tensor]


def order_of(family: str, config: Any, router: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, scores without any bias, and all usable experts, the first the most wanted."""
    x = x.reshape(-1, x.shape[-1])
    logits = x.float() @ router.weight.float().T
    if family != "deepseek_v3":
        scores = logits.softmax(dim=-1)
        return logits, scores, scores.argsort(dim=-1, descending=True)
    scores = logits.sigmoid()
    wanted = scores + router.e_score_correction_bias
    rows = []
    for token in wanted:
        groups = token.view(config.n_group, -1)
        best = groups.topk(2, dim=-1).values.sum(dim=-1).argsort(descending=True)
        kept = best[: config.topk_group].tolist()
        size = groups.shape[1]
        usable = [group * size + i for group in kept for i in range(size)]
        rows.append(sorted(usable, key=lambda expert: -float(token[expert])))
    return logits, scores, torch.tensor(rows)


def weight_of(family: str, config: Any, score: Tensor) -> Tensor:
    """The weights [T, K] of chosen experts with these scores."""
    if family == "qwen2_moe":
        return score
    scale = config.routed_scaling_factor if family == "deepseek_v3" else 1.0
    return scale * score / score.sum(dim=-1, keepdim=True)


class Routed:
    """While open, each router of a model gives `choose(layer, family's order)`, by the formula."""

    def __init__(self, model: Any, choose: Callable[[Any, Tensor, Tensor], Tensor]):
        self.model, self.choose, self.layers = model, choose, moe_layers(model)

    def __enter__(self) -> None:
        for layer in self.layers:
            layer.router.forward = self._forward(layer)

    def __exit__(self, *_: object) -> None:
        for layer in self.layers:
            del layer.router.forward

    def _forward(self, layer: Any) -> Callable[[Tensor], Routing]:
        config, family = self.model.config, self.model.config.model_type

        def forward(x: Tensor) -> Routing:
            logits, scores, order = order_of(family, config, layer.router, x)
            index = self.choose(layer, scores, order)
            return logits, weight_of(family, config, scores.gather(1, index)), index

        return forward


def at_rank(rank: int) -> Callable[[Any, Tensor, Tensor], Tensor]:
    """Only the expert at this rank."""
    return lambda layer, scores, order: order[:, rank - 1 : rank]


def first(number: int) -> Callable[[Any, Tensor, Tensor], Tensor]:
    """The first experts."""
    return lambda layer, scores, order: order[:, :number]


@torch.no_grad()
def logits_after(model: Any, ids: list[int]) -> Tensor:
    """Of the token that follows a text."""
    return model(torch.tensor([ids]), use_cache=False).logits[0, -1].float()


def self_contrast(
    strong: Tensor, weak: Tensor, alpha: float, beta: float
) -> tuple[Tensor, list[int]]:
    """z of one token, and the valid tokens."""
    bound = math.log(alpha) + float(strong.max())
    valid = [token for token in range(len(strong)) if float(strong[token]) >= bound]
    z = torch.full_like(strong, -math.inf)
    for token in valid:
        z[token] = (1 + beta) * strong[token] - beta * weak[token]
    return z, valid


def self_contrasted(
    model: Any, prompt: list[int], tokens: int, alpha: float, beta: float, rank: int
) -> tuple[list[int], Tensor]:
    """What SCMoE generates behind one prompt, and z of each token."""
    ids, found = list(prompt), []
    for _ in range(tokens):
        strong = logits_after(model, ids)
        with Routed(model, at_rank(rank)):
            weak = logits_after(model, ids)
        z, _ = self_contrast(strong, weak, alpha, beta)
        found.append(z)
        ids.append(int(z.argmax()))
    return ids[len(prompt) :], torch.stack(found)


@torch.no_grad()
def searched(model: Any, prompt: list[int], tokens: int, k: int, alpha: float) -> list[int]:
    """What contrastive search generates behind one prompt."""

    def states(ids: list[int]) -> Tensor:
        whole = model(torch.tensor([ids]), use_cache=False, output_hidden_states=True)
        return whole.hidden_states[-1][0].float()

    ids = list(prompt)
    for _ in range(tokens):
        likely = logits_after(model, ids).softmax(dim=-1)
        scores = {}
        for token in likely.argsort(descending=True)[:k].tolist():
            *before, last = states([*ids, token])
            alike = max(float(F.cosine_similarity(last, one, dim=0)) for one in before)
            scores[token] = (1 - alpha) * float(likely[token]) - alpha * alike
        ids.append(max(scores, key=lambda token: scores[token]))
    return ids[len(prompt) :]
