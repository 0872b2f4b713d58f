"""Numbers of experts and widths under one budget."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from moe_lab.methods.ratios.bits import Bits
from moe_lab.methods.ratios.pairs import LayerUnits, Pairs, least_error
from moe_lab.models.rounding import Scheme
from moe_lab.types import LayerInfo


def layer(index: int, groups: int = 1, seed: int = 0) -> LayerUnits:
    info = LayerInfo(
        index, f"model.layers.{index}.mlp", num_experts=4, top_k=1, hidden_size=2, groups=groups,
        groups_used=1, expert_width=3, neuron_bytes=10, expert_bytes=34,
    )  # fmt: skip
    score = torch.rand(4, 3, generator=torch.Generator().manual_seed(seed))
    return LayerUnits(info, score, range(2, 5), range(1, 4))


def test_a_cut_keeps_the_best_experts_and_of_all_the_best_units() -> None:
    one = layer(0, seed=3)
    sums, (kept, neurons, _) = one.score_EI.sum(dim=1), one.cut((2, 1))
    assert sorted(sums.argsort(descending=True)[:2].tolist()) == list(kept)
    assert neurons.sum(dim=1).tolist() == [1, 1, 1, 1]
    assert torch.equal(neurons.int().argmax(dim=1), one.score_EI.argmax(dim=1))
    assert one.cost((2, 1)) == 2 * (4 + 10)
    assert one.cost(one.whole) == 4 * 34
    grouped = layer(0, groups=2, seed=3)
    assert [expert // 2 for expert in grouped.experts(2)] == [0, 1]


def test_what_is_tried_has_both_ends_and_the_whole() -> None:
    numbers, widths = layer(0).tried()
    assert (numbers, widths) == ([2, 3, 4], [1, 2, 3])
    many = LayerUnits(layer(0).info, torch.zeros(4, 3), [2], range(8, 129, 8))
    assert many.tried()[0] == [2, 4]
    assert {8, 128, 3} <= set(many.tried()[1])
    assert len(many.tried()[1]) <= 9


def test_the_least_error_is_the_least_of_all() -> None:
    """Against all combinations of pairs of three layers, for every budget."""
    generator = np.random.default_rng(0)
    for trial in range(10):
        layers = [layer(index, seed=trial) for index in range(3)]
        errors = {
            one.info.index: {
                pair: 0.0 if pair == one.whole else float(generator.random())
                for pair in itertools.product(*one.tried())
            }
            for one in layers
        }
        every = list(itertools.product(*(list(errors[one.info.index]) for one in layers)))
        costs = [sum(one.cost(p) for one, p in zip(layers, pairs, strict=True)) for pairs in every]
        lost = [
            sum(errors[one.info.index][p] for one, p in zip(layers, pairs, strict=True))
            for pairs in every
        ]
        for budget in (3 * 28, 150, 260, 333, 3 * 136):
            possible = [value for value, cost in zip(lost, costs, strict=True) if cost <= budget]
            found, total = least_error(layers, errors, budget)
            assert total == pytest.approx(min(possible))
            assert sum(one.cost(found[one.info.index]) for one in layers) <= budget
            assert total == pytest.approx(sum(errors[i][pair] for i, pair in found.items()))


def test_between_measured_pairs_it_is_straight() -> None:
    info = layer(0).info
    one = LayerUnits(info, torch.zeros(4, 3), [4], [1, 2, 3])
    errors = {0: {(4, 1): 4.0, (4, 2): 2.0, (4, 3): 0.0}}
    assert least_error([one], errors, 4 * 24) == ({0: (4, 2)}, 2.0)
    wide = LayerUnits(
        LayerInfo(0, "x", 4, 1, 2, expert_width=9, neuron_bytes=10, expert_bytes=94),
        torch.zeros(4, 9), [4], range(1, 10),
    )  # fmt: skip
    known = {0: {(4, w): float(9 - w) for w in wide.tried()[1]}}
    found, total = least_error([wide], known, 4 * 54)
    assert (found, total) == ({0: (4, 5)}, pytest.approx(4.0))


def with_bits(values: tuple[int, ...], group_size: int | None = None) -> LayerUnits:
    info = LayerInfo(
        0, "model.layers.0.mlp", num_experts=4, top_k=1, hidden_size=32, expert_width=16,
        neuron_parameters=96, neuron_bytes=192, expert_bytes=16 * 192 + 64,
    )  # fmt: skip
    return LayerUnits(info, torch.rand(4, 16), [2, 4], [8, 12, 16], Bits(values, group_size))


def test_bits_are_a_third_number() -> None:
    one = with_bits((2, 4, 16), 8)
    assert one.whole == (4, 16, 16) and one.cost(one.whole) == 4 * one.info.expert_bytes
    assert one.cut((2, 8, 4)).scheme == Scheme(4, 8) and one.cut(one.whole).scheme is None
    every = one.shapes(one.numbers, one.widths)
    assert (2, 12, 16) in every and (2, 12, 4) not in every  # 8 does not divide 12
    errors = {shape: float(64 - shape[0] * shape[1] + 16 - shape[2]) for shape in every}
    budget = one.cost((4, 16, 2))
    found, total = least_error([one], {0: errors}, budget)
    possible = [(error, s) for s, error in errors.items() if one.cost(s) <= budget]
    assert (total, found[0]) == min(possible)
    assert one.least == one.cost((2, 8, 2))


def test_what_is_not_among_the_bits_is_not_chosen() -> None:
    one = with_bits((2, 8))
    errors = dict.fromkeys(one.shapes(one.numbers, one.widths), 1.0)
    assert least_error([one], {0: errors}, one.cost(one.whole))[0][0][2] in (2, 8)


def test_pairs_tell_what_was_found() -> None:
    assert Pairs({1: (2, 3)}, {"error": "kl"}).found == {"error": "kl"}
