"""The search for experts against brute force over the whole model."""

from __future__ import annotations

import pytest
from condensing import brute_force_divergence, brute_force_states, planned, with_condensed


def test_expert_search_equals_brute_force(searched) -> None:
    model, batches, statistics, intact, plan = searched
    ours = {edit.index: edit for edit in (*plan.edited(), *plan.searched)}
    assert sorted(ours) == sorted(statistics)
    for index, edit in ours.items():
        chosen: list[int] = []
        for step in range(4):
            if step > 0:
                values = {}
                for expert in set(range(8)) - set(chosen):
                    if statistics[index]["count"][expert] > 0:
                        changed = with_condensed(model, {index: [*chosen, expert]}, statistics)
                        states = brute_force_states(changed, batches)
                        values[expert] = brute_force_divergence(intact, states, index + 1)
                chosen.append(min(sorted(values), key=values.__getitem__))
                value = values[chosen[-1]]
            else:
                states = brute_force_states(with_condensed(model, {index: []}, statistics), batches)
                value = brute_force_divergence(intact, states, index + 1)
            assert edit.divergence[step] == pytest.approx(value, rel=1e-6)
        assert edit.experts == tuple(chosen)


def test_greedy_kl_chooses_experts_by_kl(measured) -> None:
    model, batches, found = measured
    statistics = {layer.info.index: layer for layer in found}
    plan, _ = planned(measured, experts="greedy_kl")
    intact = brute_force_states(model, batches)
    for edit in (*plan.edited(), *plan.searched):
        chosen: list[int] = []
        for step in (1, 2):
            values = {}
            for expert in set(range(8)) - set(chosen):
                choices = {edit.index: [*chosen, expert]}
                states = brute_force_states(with_condensed(model, choices, statistics), batches)
                values[expert] = brute_force_divergence(intact, states, edit.index + 1, "kl")
            chosen.append(min(sorted(values), key=values.__getitem__))
            assert edit.divergence[step] == pytest.approx(values[chosen[-1]], rel=1e-6)
        assert list(edit.experts) == chosen
