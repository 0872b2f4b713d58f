"""Experts of a layer by each score, and of which layers."""

from __future__ import annotations

import pytest
from condensing import experts_of, planned

from moe_lab.methods.condense.gates.mean_selected import choose as mean_gates


def ranked(scores) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))


def l1(model, index: int) -> list[float]:
    experts = model.model.layers[index].mlp.experts
    both = (experts.gate_up_proj, experts.down_proj)
    return [sum(weight[e].detach().abs().sum().item() for weight in both) for e in range(8)]


EXPERT_SCORES = {
    "frequency": lambda model, layer: layer["count"],
    "soft_count": lambda model, layer: layer["probability_sum"],
    "mean_gate": lambda model, layer: mean_gates(layer),
    "l1": lambda model, layer: l1(model, layer.info.index),
}


@pytest.mark.parametrize("name", EXPERT_SCORES)
def test_experts_by_a_score(measured, name: str) -> None:
    model, _, found = measured
    plan, _ = planned(measured, experts=name, num_routed=3)
    expected = {s.info.index: ranked(EXPERT_SCORES[name](model, s))[:3] for s in found}
    assert experts_of(plan) == expected


def test_expert_options_differ(measured) -> None:
    names = [*EXPERT_SCORES, "greedy_js", "random"]
    plans = [experts_of(planned(measured, experts=name, num_routed=3)[0]) for name in names]
    assert all(a != b for i, a in enumerate(plans) for b in plans[:i])


def test_only_the_layers_in_question_get_experts(measured) -> None:
    plan, _ = planned(measured, layers=[3])
    assert [edit.index for edit in plan.edited()] == [3]
    assert plan.searched == ()
    assert len(planned(measured, layers="greedy_js", num_layers=1)[0].searched) == 2
