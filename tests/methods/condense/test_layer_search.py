"""The search for layers against brute force over the whole model, and its cost."""

from __future__ import annotations

import pytest
import torch
from condensing import (
    brute_force_divergence,
    brute_force_states,
    experts_of,
    planned,
    with_condensed,
)
from torch.nn import functional as F

from moe_lab.methods.condense.layer_search import CondensedSets, greedy_layers
from moe_lab.models.edits.condense import CondenseLayer
from moe_lab.models.stream import LayerStream
from moe_lab.types import NotFinite


def test_layer_search_equals_brute_force(searched) -> None:
    model, batches, statistics, intact, plan = searched
    experts = {edit.index: list(edit.experts) for edit in (*plan.edited(), *plan.searched)}
    order: list[int] = []
    for step in range(2):
        values = {}
        for index in sorted(set(experts) - set(order)):
            choices = {i: experts[i] for i in (*order, index)}
            states = brute_force_states(with_condensed(model, choices, statistics), batches)
            values[index] = brute_force_divergence(intact, states, -1)
        order.append(min(values, key=values.__getitem__))
        assert plan.layer_divergence[step] == pytest.approx(values[order[-1]], rel=1e-6)
    assert plan.layer_order == tuple(order)


def brute_force_perplexity(model, batches: list[dict]) -> float:
    losses = []
    for batch in batches:
        with torch.no_grad():
            logits = model(**batch).logits
        for row, length in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
            labels = batch["input_ids"][row, 1:length]
            losses.append(F.cross_entropy(logits[row, : length - 1], labels, reduction="none"))
    return float(torch.cat(losses).mean().exp())


def harm(measured, name: str, sets: list[tuple[int, ...]], experts: dict) -> list[float]:
    """What an option minimises, for each set of condensed layers, by running whole models."""
    model, batches, found = measured
    statistics = {layer.info.index: layer for layer in found}
    intact = brute_force_states(model, batches)
    values = []
    for one in sets:
        changed = with_condensed(model, {i: experts[i] for i in one}, statistics)
        if name == "ppl":
            values.append(brute_force_perplexity(changed, batches))
        else:
            position = one[0] + 1 if name == "local" else -1
            measure = "kl" if name == "kl" else "js"
            states = brute_force_states(changed, batches)
            values.append(brute_force_divergence(intact, states, position, measure))
    return values


@pytest.mark.parametrize("name", ["js", "kl", "ppl"])
def test_greedy_layers_against_brute_force(measured, name: str) -> None:
    plan, _ = planned(measured, layers=f"greedy_{name}", num_layers=3)
    experts, order = experts_of(plan), ()
    for step in range(3):
        sets = [(*order, index) for index in (1, 2, 3) if index not in order]
        values = harm(measured, name, sets, experts)
        best = min(range(len(sets)), key=values.__getitem__)
        order = sets[best]
        assert plan.layer_divergence[step] == pytest.approx(values[best], rel=1e-6)
    assert plan.layer_order == order


@pytest.mark.parametrize("name", ["local", "global"])
def test_one_shot_layers_against_brute_force(measured, name: str) -> None:
    plan, _ = planned(measured, layers=f"one_shot_{name}", num_layers=3)
    values = harm(measured, name, [(1,), (2,), (3,)], experts_of(plan))
    expected = sorted((1, 2, 3), key=lambda index: values[index - 1])
    assert plan.layer_order == tuple(expected)
    assert plan.layer_divergence == pytest.approx(sorted(values), rel=1e-6)


def test_a_beam_finds_what_exhaustive_search_finds(measured) -> None:
    wide, _ = planned(measured, beam=99)
    experts = experts_of(wide)
    pairs = [(1, 2), (1, 3), (2, 3)]
    values = harm(measured, "js", pairs, experts)
    assert set(wide.layer_order) == set(pairs[min(range(3), key=values.__getitem__)])
    assert wide.layer_divergence[-1] == pytest.approx(min(values), rel=1e-6)


def test_the_layer_search_needs_few_layer_evaluations(measured) -> None:
    model, batches, found = measured
    stream = LayerStream(model, batches)
    experts = experts_of(planned(measured)[0])
    edits = {
        layer.info.index: CondenseLayer(
            layer.info.index, layer.info.name,
            experts=tuple(experts[layer.info.index]), gates=(0.3, 0.3),
        )
        for layer in found
    }  # fmt: skip
    sets = CondensedSets(lambda: stream, edits, lambda identity, work: work())
    greedy_layers(sets, 3, 1, sets.js)
    # The intact model; layers 1, 2, 3 each condensed alone; then from what is kept.
    assert sets.evaluations <= 4 + (3 + 2 + 1) + (3 + 2 + 3) + (3 + 2)
    brute_force = 4 * (1 + 3 + 2 + 1)
    assert sets.evaluations < brute_force
    kept = [key for key in stream.cache._memory if key[0] not in ("input", "intact last")]
    assert len({key[:2] for key in kept}) <= 2 * len(stream.layers)


def test_a_value_that_is_none_names_its_set_and_an_infinite_one_is_not_chosen(measured) -> None:
    model, batches, _ = measured

    def answer(values: list[float]) -> CondensedSets:
        sets = CondensedSets(lambda: LayerStream(model, batches), {}, lambda _, work: work())
        sets._divergences = lambda *_: values
        return sets

    assert answer([1.0, float("inf")]).js([(1,), (1, 2)]) == [1.0, float("inf")]
    with pytest.raises(NotFinite, match=r"js with layers \[1, 2\] condensed is NaN"):
        answer([1.0, float("nan")]).js([(1,), (2, 1)])
