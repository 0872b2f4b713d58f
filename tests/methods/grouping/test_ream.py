"""Centroids take in the most similar until they are full."""

from __future__ import annotations

import torch
from layer_statistics import routed_alike

from moe_lab.methods.grouping import ream
from moe_lab.methods.grouping.base import MergeCandidates
from moe_lab.profile.layer import LayerStatistics
from moe_lab.types import LayerInfo


def test_centroids_take_in_the_most_similar_in_their_order_until_they_are_full() -> None:
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(40, generator=generator).double()
    similarity = torch.rand(40, 40, generator=generator).double()
    order = score.argsort(descending=True).tolist()
    groups = ream.assigned(order, 5, similarity, 16)
    assert [len(group) for group in groups] == [16, 16, 6, 1, 1]
    assert [group[0] for group in groups] == order[:5]
    left = set(order[5:])
    for centroid, *members in groups:
        rest = left - set(members)
        assert not rest or len(members) == 15
        least = min((similarity[centroid, one] for one in members), default=1.0)
        assert all(similarity[centroid, other] <= least for other in rest)
        left = rest
    assert not left


def test_unused_experts_weigh_as_the_least_used_one() -> None:
    info = LayerInfo(0, "x", 4, 2, 2)
    count = torch.tensor([2.0, 1, 0, 1])
    found = routed_alike(info, count, torch.zeros(4, 4))
    found.sums["gate_norm_sum"] = torch.tensor([4.0, 3, 0, 0.2]).double()
    groups = ream.Ream().choose(MergeCandidates(found, 2, torch.eye(4).double()))
    assert groups.groups == ((0,), (1, 2, 3))  # scores 2, 3, 0, 0.2
    torch.testing.assert_close(torch.tensor(groups.weights[1]), torch.tensor([3, 0.2, 0.2]) / 3.4)
    found.sums |= {"count": torch.zeros(4), "gate_norm_sum": torch.zeros(4)}
    assert (
        ream.Ream().choose(MergeCandidates(found, 2, torch.eye(4).double())).weights[0]
        == (1 / 3,) * 3
    )


def test_experts_whose_logits_point_the_same_way_are_alike() -> None:
    """1 - d / max d, d the distance of two experts' logits divided by their norms."""
    logits_TE = torch.randn(30, 4, generator=torch.Generator().manual_seed(1)).double()
    logits_TE[:, 3] = 2.5 * logits_TE[:, 0]
    found = LayerStatistics(LayerInfo(0, "x", 4, 2, 2))
    found.sums["logit_product_sum"] = logits_TE.T @ logits_TE
    unit_ET = (logits_TE / logits_TE.norm(dim=0)).T
    distance = torch.cdist(unit_ET, unit_ET)
    expected = 1 - distance / distance.max()
    torch.testing.assert_close(ream.logit_similarity(found), expected, rtol=0, atol=1e-6)
    assert ream.logit_similarity(found)[0, 3] > 1 - 1e-6 and expected.min() == 0
