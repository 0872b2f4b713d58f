"""Routers of each family, a token at a time, and what a model was seen to do."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.models.observing import observe
from moe_lab.types import Routing


def observed(model, batch: dict[str, Tensor]) -> tuple[Tensor, dict[int, Routing]]:
    seen: dict[int, Routing] = {}
    with torch.no_grad(), observe(model, lambda info, r: seen.update({info.index: r})) as opened:
        opened.valid = batch["attention_mask"].bool()
        logits = model(**batch).logits
    return logits, seen


def slow_router(layer, x: Tensor, config) -> tuple[Tensor, Tensor]:
    """Router weights [E] (0 where not chosen) and full probabilities [E] of one token, float64.

    Written from the families' descriptions, not from their code.
    """
    router = layer.router
    logits = slow_logits(layer, x)
    kind = config.model_type
    if kind in ("deepseek_v3", "glm4_moe"):
        probability = torch.sigmoid(logits)
        choice = probability + router.e_score_correction_bias.double()
        if config.n_group > 1:
            groups = choice.view(config.n_group, -1)
            best = groups.topk(2, dim=1).values.sum(dim=1).topk(config.topk_group).indices
            allowed = torch.zeros_like(groups, dtype=torch.bool)
            allowed[best] = True
            choice = choice.masked_fill(~allowed.view(-1), float("-inf"))
    else:
        probability = choice = torch.softmax(logits, dim=0)
    chosen = choice.topk(layer.info.top_k).indices
    weight = torch.zeros_like(probability)
    weight[chosen] = probability[chosen]
    if kind in ("mixtral", "gpt_oss") or (kind != "deepseek_v2" and config.norm_topk_prob):
        weight = weight / weight.sum()
    if kind in ("deepseek_v2", "deepseek_v3", "glm4_moe"):
        weight = weight * config.routed_scaling_factor
    return weight, probability


def slow_logits(layer, x: Tensor) -> Tensor:
    logits = layer.router.weight.detach().double() @ x.double()
    bias = getattr(layer.router, "bias", None)
    return logits if bias is None else logits + bias.detach().double()
