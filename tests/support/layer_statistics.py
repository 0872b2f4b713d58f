"""One layer's statistics, written out by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.profile.layer import LayerStatistics
from moe_lab.types import LayerInfo, Routing

TWO = LayerInfo(3, "model.layers.3.mlp", num_experts=2, top_k=1, hidden_size=4)


def sent_to_one(y_TD: Tensor, **states: Tensor) -> LayerStatistics:
    """All tokens to expert 1, with weight 1, in two batches."""
    layer = LayerStatistics(TWO, scoring="softmax")
    for start, part_TD in zip((0, len(y_TD) // 2), y_TD.tensor_split(2), strict=True):
        tokens = len(part_TD)
        ones_T = torch.ones(tokens)
        index_T = torch.ones(tokens, dtype=torch.long)
        parts = {name: state[start : start + tokens] for name, state in states.items()}
        layer.add(
            Routing(part_TD, torch.zeros(tokens, 2), index_T[:, None], ones_T[:, None], part_TD,
                    index_T, torch.arange(tokens), ones_T, **parts)
        )  # fmt: skip
    return layer


FOUR = LayerInfo(3, "model.layers.3.mlp", num_experts=4, top_k=2, hidden_size=2)


def by_hand() -> LayerStatistics:
    """Three tokens, four experts, two chosen; written out so that each formula can be checked."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 3.0, 1.0, -2.0], [1.0, 2.0, 0.0, 0.5]])
    probability = logits.softmax(dim=1)
    index = torch.tensor([[0, 1], [1, 2], [1, 0]])
    weight = probability.gather(1, index)
    expert = torch.tensor([0, 0, 1, 1, 1, 2])
    token = torch.tensor([0, 2, 0, 1, 2, 1])
    y = torch.tensor([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [6.0, 8.0]])
    layer = LayerStatistics(FOUR)
    layer.add(
        Routing(torch.zeros(3, 2), logits, index, weight, y, expert, token,
                probability[token, expert])
    )  # fmt: skip
    return layer


def statistics_of(info: LayerInfo, **sums: Tensor) -> LayerStatistics:
    return LayerStatistics(info, {name: value.double() for name, value in sums.items()})


def routed_alike(info: LayerInfo, count: Tensor, cosine: Tensor) -> LayerStatistics:
    return statistics_of(info, count=count, logit_product_sum=cosine + torch.eye(len(cosine)))
