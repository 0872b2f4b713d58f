"""Tensor rings: tensors that are made with ranks, rounds, and which ranks are taken."""

from __future__ import annotations

import itertools

import pytest
import torch

from moe_lab.methods.factorizing.base import ExpertMatrices, relative_error, stack_values
from moe_lab.methods.factorizing.low_rank import shared_left, shared_right
from moe_lab.methods.factorizing.tr import TR, ranks, ring_svd, swept, whole
from moe_lab.models.factors import num_factor_parameters

SHAPE = E, O, N = 6, 5, 8  # noqa: E741
torch.manual_seed(0)
TENSOR = torch.randn(SHAPE).double()


def made(first: int, second: int, third: int) -> torch.Tensor:
    torch.manual_seed(1)
    sizes = (first, E, second), (second, N, third), (third, O, first)
    return whole(tuple(torch.randn(size).double() for size in sizes))


def test_a_ring_of_full_ranks_is_the_tensor() -> None:
    for first, second in ((1, 6), (6, 1), (2, 3), (3, 2)):
        third = min(second * N, O * first)
        torch.testing.assert_close(whole(ring_svd(TENSOR, (first, second, third))), TENSOR)


def test_a_ring_of_these_ranks_is_found_again() -> None:
    tensor = made(1, 2, 3)
    torch.testing.assert_close(whole(ring_svd(tensor, (1, 2, 3))), tensor)
    tensor = made(2, 2, 3)  # which splits of a SVD need not find: the rounds do
    cores, errors = ring_svd(tensor, (2, 2, 3)), []
    for _ in range(400):
        errors.append(float((whole(cores) - tensor).square().sum()))
        cores = swept(tensor, cores)
    size = float(tensor.square().sum())
    assert all(later <= one + 1e-9 * size for one, later in itertools.pairwise(errors))
    assert errors[-1] < 1e-5 * size


def test_rings_with_one_rank_of_one_are_shared_bases() -> None:
    left, right = shared_left(TENSOR, None, 4)
    torch.testing.assert_close(whole(ring_svd(TENSOR, (1, E, 4))), left @ right)
    lefts, basis = shared_right(TENSOR, None, None, 4)
    found = float((whole(ring_svd(TENSOR, (E, 1, 4))) - TENSOR).square().sum())
    assert found == pytest.approx(float((lefts @ basis - TENSOR).square().sum()))


def test_the_best_ranks_are_taken_and_the_rounds_help() -> None:
    budget = int(0.7 * TENSOR.numel())
    tried = list(ranks(SHAPE, budget))
    assert len(tried) > 3
    form, given = TR(sweeps=0), ExpertMatrices("gate", TENSOR)
    spec = form.spec("gate", SHAPE, budget)
    fitted = form.fit(given, spec, budget)
    least = min(float((whole(ring_svd(TENSOR, one)) - TENSOR).square().sum()) for one in tried)
    assert relative_error(given, fitted) == pytest.approx(least / float(TENSOR.square().sum()))
    assert num_factor_parameters(SHAPE, fitted.spec) <= budget
    assert relative_error(given, TR().fit(given, spec, budget)) < relative_error(given, fitted)
    assert stack_values(fitted, SHAPE).shape == SHAPE
