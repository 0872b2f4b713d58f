"""Frequent experts stay, and the others join the most similar."""

from __future__ import annotations

import torch
from layer_statistics import routed_alike

from moe_lab.methods.grouping import m_smoe
from moe_lab.methods.grouping.base import MergeCandidates
from moe_lab.types import LayerInfo

INFO = LayerInfo(3, "model.layers.3.mlp", num_experts=6, top_k=2, hidden_size=2)


def test_frequent_experts_stay_and_the_others_join_the_most_similar() -> None:
    cosine = torch.zeros(6, 6)
    cosine[0, 3], cosine[2, 1], cosine[4, 3] = 0.9, 0.1, 0.2
    cosine[5, 1] = cosine[5, 3] = 0.5  # a tie: the lower one
    found = routed_alike(INFO, torch.tensor([5.0, 9, 0, 9, 2, 0]), cosine)
    groups = m_smoe.MSMoE().choose(MergeCandidates(found, 2))
    assert groups.kept == (1, 3)
    assert groups.groups == ((1, 2, 5), (3, 0, 4))
    assert groups.weights == ((1.0, 0.0, 0.0), (9 / 16, 5 / 16, 2 / 16))
    assert m_smoe.MSMoE().choose(
        MergeCandidates(routed_alike(INFO, torch.zeros(6), cosine), 3)
    ).kept == (
        0,
        1,
        2,
    )
