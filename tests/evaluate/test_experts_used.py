"""Which experts tokens use: counts and means against all batches that there are."""

from __future__ import annotations

import itertools

import pytest
import torch
from families import tiny_model

from moe_lab.evaluate.experts_used import ExpertsUsed, used_by_layer, used_figures
from moe_lab.models.editing import replace_experts, share_experts
from moe_lab.models.layers import moe_layers

INDEX = torch.tensor([[0, 1], [1, 2], [1, 8], [7, 3], [7, 0], [2, 1]])  # 8: left out


def used(layer, index: torch.Tensor = INDEX) -> ExpertsUsed:
    found = ExpertsUsed(layer)
    for part in index.split(4):
        found.add(part)
    return found.gathered()


def slow(experts: list[set[int]], batch: int) -> float:
    """The mean over all batches of so many of these tokens."""
    sizes = [len(set().union(*some)) for some in itertools.combinations(experts, batch)]
    return sum(sizes) / len(sizes)


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 6])
def test_different_experts_of_all_batches(batch: int) -> None:
    found = used(moe_layers(tiny_model("mixtral"))[0])
    experts = [set(row) - {8} for row in INDEX.tolist()]
    assert found.distinct(batch) == pytest.approx(slow(experts, batch), rel=1e-12)
    assert (found.tokens, found.pairs, int(found.count_E.sum())) == (6, 11, 11)


def test_rows_that_lead_to_one_expert_or_to_none() -> None:
    model = tiny_model("mixtral")
    share_experts(moe_layers(model)[0], [0, 3], [[0, 1, 2], [3, 4, 5, 6, 7]])
    replace_experts(moe_layers(model)[1], [0, 7], "zero")
    shared, replaced = (used(layer, INDEX[[0, 1, 3]]) for layer in moe_layers(model)[:2])
    assert shared.count_E.tolist() == [2, 1] and shared.pairs == 6
    assert replaced.count_E.tolist() == [1, 1] and replaced.pairs == 2
    assert shared.distinct(1) == 1.0 and shared.distinct(3) == 2.0


def test_figures_are_means_over_layers() -> None:
    model = tiny_model("mixtral")
    seen = [used(layer) for layer in moe_layers(model)]
    seen[0] = used(moe_layers(model)[0], INDEX.clamp(max=1)[[0, 1, 2, 3, 4, 4, 4, 4, 4]])
    figures, by_layer = used_figures(model, seen), used_by_layer(seen)
    assert figures["routing/distinct_experts_1"] == pytest.approx(
        sum(by_layer["distinct_experts_1"]) / 4
    )
    assert by_layer["experts_per_token"][1:] == [11 / 6] * 3
    assert "routing/distinct_experts_8" in figures and "distinct_experts_16" not in by_layer
    assert used_figures(model, []) == {} == used_figures(model, [ExpertsUsed(moe_layers(model)[0])])
