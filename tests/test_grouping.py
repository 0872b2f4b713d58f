"""Which experts become one, from given statistics and distances: against slow references."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from torch import Tensor

from moe_lab.methods.grouping import hc_smoe, m_smoe, ream
from moe_lab.methods.grouping.base import MergeCandidates
from moe_lab.profile.layer import LayerStatistics
from moe_lab.types import LayerInfo

INFO = LayerInfo(3, "model.layers.3.mlp", num_experts=6, top_k=2, hidden_size=2)


def statistics_of(info: LayerInfo, **sums: Tensor) -> LayerStatistics:
    return LayerStatistics(info, {name: value.double() for name, value in sums.items()})


def routed_alike(info: LayerInfo, count: Tensor, cosine: Tensor) -> LayerStatistics:
    return statistics_of(info, count=count, logit_product_sum=cosine + torch.eye(len(cosine)))


def test_frequent_experts_stay_and_the_others_join_the_most_similar() -> None:
    cosine = torch.zeros(6, 6)
    cosine[0, 3], cosine[2, 1], cosine[4, 3] = 0.9, 0.1, 0.2
    cosine[5, 1] = cosine[5, 3] = 0.5  # a tie: the lower one
    found = routed_alike(INFO, torch.tensor([5.0, 9, 0, 9, 2, 0]), cosine)
    groups = m_smoe.choose(MergeCandidates(found, 2))
    assert groups.kept == (1, 3)
    assert groups.groups == ((1, 2, 5), (3, 0, 4))
    assert groups.weights == ((1.0, 0.0, 0.0), (9 / 16, 5 / 16, 2 / 16))
    assert m_smoe.choose(MergeCandidates(routed_alike(INFO, torch.zeros(6), cosine), 3)).kept == (
        0,
        1,
        2,
    )


def test_router_groups_keep_the_same_number_and_merge_their_own() -> None:
    info = LayerInfo(1, "x", 8, 2, 2, groups=2, groups_used=1)
    cosine = torch.zeros(8, 8)
    cosine[2, 6] = cosine[4, 0] = 1.0  # of the other group: they do not count
    cosine[2, 1] = cosine[4, 7] = 0.5
    count = torch.tensor([9.0, 8, 7, 6, 1, 2, 3, 4])
    found = routed_alike(info, count, cosine)
    assert m_smoe.choose(MergeCandidates(found, 4)).groups == ((0, 3), (1, 2), (6, 5), (7, 4))
    far = torch.full((8, 8), 9.0)
    far[0, 4] = far[4, 0] = 0.0
    far[0, 3] = far[3, 0] = far[5, 6] = far[6, 5] = 1.0
    by_output = hc_smoe.choose(MergeCandidates(found, 6, far.double()))
    assert by_output.groups == ((0, 3), (1,), (2,), (4,), (6, 5), (7,))
    found.sums["gate_norm_sum"] = count.square()
    around = ream.choose(MergeCandidates(found, 4, 1 - far.double()))
    assert all(len({expert // 4 for expert in group}) == 1 for group in around.groups)
    assert around.kept == (0, 1, 6, 7)


def slow_clusters(distance: Tensor, number: int, between: object) -> set[frozenset[int]]:
    """The two clusters with the least distance become one, until `number` are left."""
    found = [frozenset([expert]) for expert in range(len(distance))]
    while len(found) > number:
        one, other = min(
            itertools.combinations(found, 2),
            key=lambda pair: between([float(distance[a, b]) for a in pair[0] for b in pair[1]]),
        )
        found = [cluster for cluster in found if cluster not in (one, other)] + [one | other]
    return set(found)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize(
    ("linkage", "between"), [("average", mean), ("complete", max), ("single", min)]
)
def test_clusters_are_those_of_a_slow_reference(linkage: str, between: object) -> None:
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        points = torch.randn(10, 4, generator=generator, dtype=torch.float64)
        distance = torch.cdist(points, points)
        for number in (1, 3, 4, 7, 10):
            found = hc_smoe.clusters(distance, number, linkage)
            assert {frozenset(one) for one in found} == slow_clusters(distance, number, between)


def test_ward_merges_where_the_variance_grows_least() -> None:
    points = torch.randn(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    distance = torch.cdist(points, points)

    def spread(cluster: frozenset[int]) -> float:
        part = points[sorted(cluster)]
        return float((part - part.mean(dim=0)).square().sum())

    found = [frozenset([expert]) for expert in range(9)]
    while len(found) > 1:
        assert {frozenset(one) for one in hc_smoe.clusters(distance, len(found), "ward")} == set(
            found
        )
        one, other = min(
            itertools.combinations(found, 2),
            key=lambda pair: spread(pair[0] | pair[1]) - spread(pair[0]) - spread(pair[1]),
        )
        found = [cluster for cluster in found if cluster not in (one, other)] + [one | other]


def test_clusters_have_the_asked_number_where_all_distances_are_equal_and_are_fast() -> None:
    assert len(hc_smoe.clusters(torch.zeros(8, 8).double(), 5, "average")) == 5
    points = torch.randn(256, 64, generator=torch.Generator().manual_seed(0)).double()
    distance = torch.cdist(points, points)
    for linkage in hc_smoe.LINKAGES:
        started = time.perf_counter()
        assert len(hc_smoe.clusters(distance, 100, linkage)) == 100
        assert time.perf_counter() - started < 1


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
    groups = ream.choose(MergeCandidates(found, 2, torch.eye(4).double()))
    assert groups.groups == ((0,), (1, 2, 3))  # scores 2, 3, 0, 0.2
    torch.testing.assert_close(torch.tensor(groups.weights[1]), torch.tensor([3, 0.2, 0.2]) / 3.4)
    found.sums |= {"count": torch.zeros(4), "gate_norm_sum": torch.zeros(4)}
    assert ream.choose(MergeCandidates(found, 2, torch.eye(4).double())).weights[0] == (1 / 3,) * 3
