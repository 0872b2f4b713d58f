"""One layer condensed in closed form, against least squares by hand on its own activations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import scipy.linalg
import torch
from families import tiny_model
from fitted_layers import (
    Subject,
    by_hand,
    edited,
    output_weights,
    plan_of,
    seen_at,
    subject_of,
)

from moe_lab.methods.condense import solving
from moe_lab.methods.condense.base import shared_gate
from moe_lab.methods.condense.gates.mean_selected import choose as mean_gates
from moe_lab.methods.condense.solving import condensed_width
from moe_lab.models.condensing import condensed
from moe_lab.models.dense_units import all_units, columns_name, units_name
from moe_lab.models.edits.condense_units import CondenseUnits
from moe_lab.models.layers import moe_layers
from moe_lab.types import UserError

DENSE = ["qwen2_moe", "mixtral", "deepseek_v3"]
LAYER = 2
NEARLY_NONE = 1e-9
CLOSED = {"refit": "down_proj", "layers": [LAYER], "ridge": NEARLY_NONE}


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("token_weight", ["output", "none"])
def test_a_refit_is_weighted_least_squares(family: str, token_weight: str) -> None:
    subject = subject_of(family)
    plan = plan_of(subject, **CLOSED, token_weight=token_weight, propagate="none")
    units_N2 = plan.tensors[units_name(LAYER)].long()
    info = {one.info.index: one.info for one in subject.profile.statistics}[LAYER]
    assert torch.equal(units_N2, all_units(info, [0, 1]))
    seen = seen_at(subject.model, subject.batches, LAYER)
    weight_T = (
        output_weights(seen) if token_weight == "output" else seen.x_TD.new_ones(len(seen.x_TD))
    )
    expected = by_hand(subject, LAYER, units_N2, seen, weight_T)
    torch.testing.assert_close(
        plan.tensors[columns_name(LAYER)].double(), expected.T, rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("family", DENSE)
def test_a_strong_ridge_returns_the_papers_layer(family: str) -> None:
    subject = subject_of(family)
    plan = plan_of(subject, **CLOSED | {"ridge": 1e12}, propagate="none")
    statistics = {one.info.index: one for one in subject.profile.statistics}[LAYER]
    layer = {one.info.index: one for one in moe_layers(copy.deepcopy(subject.model))}[LAYER]
    gates = mean_gates(statistics)[[0, 1]].tolist()
    expected = condensed(layer, [0, 1], gates, shared_gate(statistics))
    torch.testing.assert_close(
        plan.tensors[columns_name(LAYER)].double(), expected.down_proj.weight, rtol=1e-4, atol=1e-6
    )
    [edit] = plan.edited()
    assert isinstance(edit, CondenseUnits)
    assert edit.errors[0] == pytest.approx(edit.errors[1], rel=1e-6)


def all_alike(subject_family: str) -> Subject:
    """A model whose routers send every token to all experts alike: a dense layer in disguise."""
    subject = subject_of(subject_family, documents=60, num_experts_per_tok=8)
    for layer in moe_layers(subject.model):
        torch.nn.init.zeros_(layer.router.weight)
    return Subject(subject.model, subject.batches, subject.profile)


def test_enough_units_are_a_dense_target_exactly() -> None:
    subject = all_alike("mixtral")
    width = 8 * 16
    plan = plan_of(
        subject, **CLOSED, experts="neurons", width=width, num_routed=8, propagate="none"
    )
    [edit] = plan.edited()
    assert edit.width == width and edit.errors[-1] < 1e-9
    for batch in subject.batches[:3]:
        with torch.no_grad():
            got, expected = edited(subject, plan)(**batch).logits, subject.model(**batch).logits
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    fewer = plan_of(subject, **CLOSED, experts="neurons", width=40, num_routed=8, propagate="none")
    assert 1e-4 < fewer.edited()[0].errors[-1] < 1


@torch.no_grad()
def test_gates_by_least_squares() -> None:
    subject = subject_of("qwen2_moe")
    options: dict[str, Any] = CLOSED | {"refit": "gates", "token_weight": "none"}
    plan = plan_of(subject, **options, propagate="none")
    [edit] = plan.edited()
    layer = {one.info.index: one for one in moe_layers(subject.model)}[LAYER]
    seen = seen_at(subject.model, subject.batches, LAYER)
    parts = [layer.shared(seen.x_TD)]
    for expert in (0, 1):
        gate, up = (seen.x_TD @ layer.experts.gate_up_proj[expert].T).chunk(2, dim=-1)
        hidden = torch.nn.functional.silu(gate) * up
        parts.append(hidden @ layer.experts.down_proj[expert].T)
    stacked = torch.stack(parts, dim=-1).flatten(0, 1).numpy()
    expected = scipy.linalg.lstsq(stacked, seen.y_TD.flatten().numpy())[0]
    assert [edit.shared_gate, *edit.gates] == pytest.approx(expected, rel=1e-4)
    assert edit.kind == "condense" and edit.gated_parts.num_experts == 2


def test_neurons_beat_whole_experts_on_what_they_are_fitted_to() -> None:
    subject = subject_of("qwen2_moe", documents=60)
    errors = {
        name: plan_of(subject, **CLOSED, experts=name, propagate="none").edited()[0].errors[-1]
        for name in ("random", "greedy_js", "least_squares", "neurons")
    }
    assert errors["neurons"] < errors["least_squares"]
    assert errors["least_squares"] <= errors["greedy_js"] * (1 + 1e-9)
    assert errors["least_squares"] < errors["random"]


def test_many_units_are_screened_one_expert_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = subject_of("qwen2_moe", documents=60)
    options = CLOSED | {"experts": "neurons", "propagate": "none", "width": 20}
    whole = plan_of(subject, **options).edited()[0].errors[-1]
    sizes: list[int] = []
    made = solving.NormalEquations

    def watched(num_units: int, *more: Any) -> Any:
        sizes.append(num_units)
        return made(num_units, *more)

    monkeypatch.setattr(solving, "NormalEquations", watched)
    monkeypatch.setattr(solving, "CANDIDATES", 25)
    screened = plan_of(subject, **options).edited()[0].errors[-1]
    assert sizes == [40, 20]  # twice the width, and those chosen
    assert whole <= screened < 1.5 * whole


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"experts": "neurons"}, r"condense\.refit=down_proj, or condense=closed_form"),
        ({"width": 30}, r"condense\.experts=neurons"),
        (
            {"width": 999, "experts": "neurons", "refit": "down_proj"},
            r"condense\.width=999: layer 1 has 152 hidden units",
        ),
        ({"propagate": "block"}, r"condense\.refit=none: condense\.refit=down_proj"),
        ({"own_documents": 3}, r"condense\.refit=none fits nothing: condense\.refit=down_proj"),
        ({"own_documents": -1, "refit": "down_proj"}, "at least 0"),
        ({"own_weight": -0.1, "refit": "down_proj"}, "at least 0"),
        ({"fit_steps": 5}, r"condense\.refit=none: condense\.refit=down_proj"),
        ({"fit_steps": 5, "refit": "gates"}, r"condense\.refit=gates: condense\.refit=down_proj"),
        ({"fit_steps": -1}, r"at least 0"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        plan_of(subject_of("qwen2_moe"), **options)


def test_the_width_of_a_condensed_layer() -> None:
    [info, *_] = [layer.info for layer in moe_layers(tiny_model("qwen2_moe"))]
    assert condensed_width(info, 2) == 24 + 2 * 16
    [info, *_] = [layer.info for layer in moe_layers(tiny_model("mixtral"))]
    assert condensed_width(info, 2) == 2 * 16
