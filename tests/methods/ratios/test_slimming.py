"""MoE-Slimming's coverage against its bisection."""

from __future__ import annotations

import pytest
import torch
from neuron_pools import scored_pools
from torch import Tensor

from moe_lab.methods.ratios.slimming import Slimming, covered
from moe_lab.profile.profile import Profile

SHAPES = ((6, 40), (4, 60), (6, 40))


def by_bisection(scores: list[Tensor], number: int) -> list[int]:
    """The smallest prefixes of sorted scores with a share s of their sum, s by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        level = (low + high) / 2
        found = []
        for score_N in scores:
            sums_N = score_N.sort(descending=True).values.cumsum(0)
            found.append(int((sums_N < level * sums_N[-1]).sum()) + 1)
        low, high = (level, high) if sum(found) <= number else (low, level)
        if sum(found) == number:
            return found
    raise AssertionError("no level keeps so many")


@pytest.mark.parametrize("seed", range(3))
def test_the_level_is_that_of_bisection(seed: int) -> None:
    scores = [score_EI.flatten() for _, score_EI in scored_pools(*SHAPES, seed=seed)]
    for number in (100, 300, 500):
        assert covered(scores, [0, 0, 0], number) == by_bisection(scores, number)


@pytest.mark.parametrize(("floor", "multiple"), [(0, 1), (4, 1), (8, 8), (16, 8)])
def test_layers_and_experts_keep_the_same_share(floor: int, multiple: int) -> None:
    layers = scored_pools(*SHAPES)
    ratio = Slimming(0.5, floor=floor, round_to=multiple)
    ratio.check([pool for pool, _ in layers])
    widths = ratio.widths(layers, Profile([]))
    total = sum(score_EI.numel() for _, score_EI in layers)
    kept = sum(int(width_E.sum()) for width_E in widths.values())
    assert 0 <= total // 2 - kept < multiple, "what one layer leaves the next one has"
    for (pool, score_EI), width_E in zip(layers, widths.values(), strict=True):
        assert ((width_E % multiple == 0) | (width_E == pool.expert_width)).all()
        assert (width_E >= floor).all() and (width_E <= pool.expert_width).all()
        if (floor, multiple) == (0, 1):
            number = by_bisection([one.flatten() for _, one in layers], total // 2)[pool.index]
            assert width_E.tolist() == by_bisection(list(score_EI), number)


def test_sizes_of_scores_do_not_count() -> None:
    layers = scored_pools(*SHAPES)
    other = [(pool, score_EI * 10.0 ** (3 * pool.index)) for pool, score_EI in layers]
    one, same = (Slimming(0.5).widths(some, Profile([])) for some in (layers, other))
    assert all(torch.equal(one[index], same[index]) for index in one)


def test_an_expert_without_scores_keeps_the_floor() -> None:
    layers = scored_pools((4, 40), (4, 40))
    layers[0][1][2] = 0
    layers[1][1][3] = -1  # as those without tokens have in other metrics
    widths = Slimming(0.5, floor=4, round_to=4).widths(layers, Profile([]))
    assert int(widths[0][2]) == int(widths[1][3]) == 4
    assert (widths[0][[0, 1, 3]] > 4).all()
