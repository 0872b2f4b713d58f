"""Clusters of experts against slow references."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from torch import Tensor

from moe_lab.methods.grouping import hc_smoe


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
