"""Criteria of hidden units that one pass's sums are enough for, against loops over tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from families import tiny_batch, tiny_model
from slow_neurons import NEURON_FAMILIES, block_of, is_moe, seen_by, slow_columns
from torch import Tensor

from moe_lab.methods.metrics.base import as_metric, names_of_unit
from moe_lab.methods.metrics.camera import camera
from moe_lab.methods.metrics.energy import energy
from moe_lab.methods.metrics.magnitude import magnitude
from moe_lab.methods.metrics.random import Random, random
from moe_lab.methods.metrics.reap import reap
from moe_lab.methods.metrics.wanda import wanda
from moe_lab.models.hidden_units import HiddenUnits
from moe_lab.models.layers import moe_layers
from moe_lab.profile.collect import collect_statistics
from moe_lab.profile.layer import LayerStatistics

CRITERIA: dict[str, Callable[[LayerStatistics], Tensor]] = {
    "energy": energy,
    "camera, the maximum": lambda layer: camera(layer, alpha=1.0),
    "camera, mixed": lambda layer: camera(layer, alpha=0.9),
    "camera, the sum": lambda layer: camera(layer, alpha=0.0),
    "wanda": wanda,
    "magnitude": magnitude,
}


def slow_scores(family: str) -> dict[int, dict[str, Tensor]]:
    """All of them by definition: for each token what its layer's output loses without a unit."""
    model, batch = tiny_model(family), tiny_batch()
    lost: dict[tuple[int, int], list[Tensor]] = {}
    hidden: dict[tuple[int, int], list[Tensor]] = {}
    for one in seen_by(model, batch):
        columns = slow_columns(block_of(model.model.layers[one.layer]).experts, one.expert)
        without = torch.stack(
            [(one.weight * one.hidden[c] * columns[c]).square().sum() for c in range(len(columns))]
        )
        lost.setdefault((one.layer, one.expert), []).append(without)
        hidden.setdefault((one.layer, one.expert), []).append(one.hidden)
    scores: dict[int, dict[str, Tensor]] = {}
    for index, decoder in enumerate(model.model.layers):
        if not is_moe(decoder):
            continue
        experts = block_of(decoder).experts
        made: dict[str, list[Tensor]] = {name: [] for name in CRITERIA}
        units = HiddenUnits(experts)
        for expert in range(8):
            columns, nothing = slow_columns(experts, expert), torch.zeros(1, 16)
            energies = torch.stack(lost.get((index, expert), [nothing[0].double()]))
            acts = torch.stack(hidden.get((index, expert), [nothing[0].double()]))
            total, most = energies.sum(dim=0), energies.amax(dim=0)
            made["energy"].append(total)
            made["camera, the maximum"].append(most)
            made["camera, mixed"].append(0.1 * total + 0.9 * most)
            made["camera, the sum"].append(total)
            made["wanda"].append(
                (columns.abs()[None] * acts.square().sum(dim=0).sqrt()[None, :, None]).sum((0, 2))
            )
            weights = units.weights(expert).detach().double()
            made["magnitude"].append(weights.square().sum(dim=1).sqrt())
        scores[index] = {name: torch.stack(rows) for name, rows in made.items()}
    return scores


@pytest.mark.parametrize("family", NEURON_FAMILIES)
def test_each_is_what_loops_over_tokens_say(family: str) -> None:
    expected = slow_scores(family)
    for layer in collect_statistics(tiny_model(family), [tiny_batch()], neurons=True):
        for name, criterion in CRITERIA.items():
            value = expected[layer.info.index][name]
            assert value.shape == (8, 16)
            torch.testing.assert_close(
                criterion(layer), value, rtol=1e-5, atol=1e-7 * float(value.max()), msg=name
            )


@pytest.mark.parametrize("family", NEURON_FAMILIES)
def test_permuting_neurons_permutes_scores(family: str) -> None:
    order = torch.randperm(16, generator=torch.Generator().manual_seed(5))
    model = tiny_model(family)
    before = collect_statistics(model, [tiny_batch()], neurons=True)
    with torch.no_grad():
        for layer in moe_layers(model):
            HiddenUnits(layer.experts).keep(order.expand(8, 16))
    after = collect_statistics(model, [tiny_batch()], neurons=True)
    for one, other in zip(before, after, strict=True):
        for name, criterion in CRITERIA.items():
            value = criterion(one)[:, order]
            torch.testing.assert_close(
                criterion(other), value, rtol=1e-4, atol=1e-6 * float(value.max()), msg=name
            )


def test_a_unit_that_adds_nothing_scores_zero() -> None:
    model = tiny_model("mixtral")
    with torch.no_grad():
        for layer in moe_layers(model):
            layer.experts.down_proj[:, :, 3] = 0
    for found in collect_statistics(model, [tiny_batch()], neurons=True):
        for name, criterion in CRITERIA.items():
            if name != "magnitude":
                assert criterion(found)[:, 3].tolist() == [0.0] * 8, name


def test_what_scores_what_is_known() -> None:
    assert as_metric(energy).units == ("neurons",)
    assert as_metric(reap).units == ("experts",)
    assert Random(0).units == ("experts", "neurons")
    assert {"energy", "camera", "random"} <= set(names_of_unit("neurons"))
    assert "reap" not in names_of_unit("neurons")
    assert {"reap", "random", "naee", "unified"} <= set(names_of_unit("experts"))
    assert "energy" not in names_of_unit("experts")
    assert (as_metric(camera).widths, as_metric(energy).widths) == ("by_expert", "by_layer")


def test_random_scores_are_drawn_for_each_unit() -> None:
    layer = collect_statistics(tiny_model("mixtral"), [tiny_batch()], neurons=True)[0]
    one, other = Random(0).neuron_score(layer), Random(1).neuron_score(layer)
    assert one.shape == (8, 16)
    assert torch.equal(one, Random(0).neuron_score(layer))
    assert not torch.equal(one, other)
    assert torch.equal(Random(3).score(layer), random(layer, 3))
