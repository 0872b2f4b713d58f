"""Condensed layers in closed form, against least squares by hand on a model's own activations."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from families import tiny_model
from fitted_layers import Seen, Subject, batch_of, edited, plan_of, seen_at, subject_of
from torch import Tensor

from moe_lab.methods.condense import refits
from moe_lab.methods.condense.base import shared_gate
from moe_lab.methods.condense.gates.mean_selected import choose as mean_gates
from moe_lab.methods.condense.refits import width_of
from moe_lab.models.condensing import condensed
from moe_lab.models.dense_units import UnitWeights, all_units, columns_name, units_name
from moe_lab.models.edits.condense_units import CondenseUnits
from moe_lab.models.layers import moe_layers
from moe_lab.profile.documents import to_fit_and_choose
from moe_lab.profile.own_text import own_text
from moe_lab.types import UserError

DENSE = ["qwen2_moe", "mixtral", "deepseek_v3"]
LAYER = 2
NEARLY_NONE = 1e-9
CLOSED = {"refit": "down_proj", "layers": [LAYER], "ridge": NEARLY_NONE}


def by_hand(subject: Subject, units_N2: Tensor, seen: Seen, weight_T: Tensor) -> Tensor:
    """The columns [N, D] with the least weighted squared error, by scipy."""
    layer = {one.info.index: one for one in moe_layers(subject.model)}[LAYER]
    z_TN = UnitWeights(layer).hidden(units_N2)(seen.x_TD).detach()
    root_T1 = weight_T.sqrt()[:, None]
    solution = scipy.linalg.lstsq((z_TN * root_T1).numpy(), (seen.y_TD * root_T1).numpy())[0]
    return torch.from_numpy(np.asarray(solution))


def output_weights(seen: Seen) -> Tensor:
    return 1 / seen.leaving_TD.square().mean(dim=1)


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
    expected = by_hand(subject, units_N2, seen, weight_T)
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


@pytest.mark.parametrize("propagate", ["none", "block", "residual"])
def test_what_a_layer_behind_a_condensed_one_is_fitted_to(propagate: str) -> None:
    subject = subject_of("qwen2_moe")
    options = CLOSED | {"layers": [1, LAYER], "propagate": propagate}
    plan = plan_of(subject, **options)
    first = plan_of(subject, **options | {"layers": [1]})
    for name, tensor in first.tensors.items():
        assert torch.equal(plan.tensors[name], tensor)
    intact = seen_at(subject.model, subject.batches, LAYER)
    behind = seen_at(edited(subject, first), subject.batches, LAYER)
    residual_TD = behind.leaving_TD - behind.y_TD
    seen, weight_T = {
        "none": (intact, output_weights(intact)),
        "block": (behind, output_weights(behind)),
        "residual": (
            Seen(behind.x_TD, intact.leaving_TD - residual_TD, intact.leaving_TD),
            output_weights(intact),
        ),
    }[propagate]
    expected = by_hand(subject, plan.tensors[units_name(LAYER)].long(), seen, weight_T)
    torch.testing.assert_close(
        plan.tensors[columns_name(LAYER)].double(), expected.T, rtol=1e-3, atol=1e-5
    )


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


def test_own_text_is_fitted_along_with_a_weight_of_its_own() -> None:
    subject = subject_of("qwen2_moe")
    options: dict[str, Any] = CLOSED | {"propagate": "none", "own_documents": 12}
    plan = plan_of(subject, **options, own_weight=0.4)
    written = own_text(subject.profile, 12, 16)
    seen = seen_at(subject.model, subject.batches, LAYER)
    own = seen_at(subject.model, [batch_of(one) for one in written], LAYER)
    share = 0.4 * len(seen.x_TD) / len(own.x_TD)
    both = Seen(*(torch.cat(parts) for parts in zip(seen, own, strict=True)))
    weight_T = torch.cat([output_weights(seen), share * output_weights(own)])
    expected = by_hand(subject, plan.tensors[units_name(LAYER)].long(), both, weight_T)
    torch.testing.assert_close(
        plan.tensors[columns_name(LAYER)].double(), expected.T, rtol=1e-3, atol=1e-5
    )
    without = plan_of(subject, **options | {"own_documents": 0})
    assert not torch.allclose(
        without.tensors[columns_name(LAYER)], plan.tensors[columns_name(LAYER)], rtol=0.1
    )
    of_no_weight = plan_of(subject, **options, own_weight=0.0)
    torch.testing.assert_close(
        of_no_weight.tensors[columns_name(LAYER)], without.tensors[columns_name(LAYER)]
    )


def test_layers_are_chosen_on_own_text_too() -> None:
    """On documents of it, as of the calibration set, to which no candidate was fitted."""
    subject, opened = subject_of("qwen2_moe"), []
    open_stream = subject.profile.open_stream

    def watched(*args: Any, documents: Any = None, **kwargs: Any) -> Any:
        opened.append(documents)
        return open_stream(*args, documents=documents, **kwargs)

    profile = dataclasses.replace(subject.profile, open_stream=watched)
    options = CLOSED | {"layers": "greedy_logits", "own_documents": 12}
    plan_of(subject._replace(profile=profile), **options)
    fit, choose = to_fit_and_choose(24)
    assert fit in opened and choose in opened
    assert {place >= 12 for place in fit} == {place >= 12 for place in choose} == {True, False}


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
    found = refits._equations

    def watched(weights: Any, units_N2: Tensor, data: Any) -> Any:
        sizes.append(len(units_N2))
        return found(weights, units_N2, data)

    monkeypatch.setattr(refits, "_equations", watched)
    monkeypatch.setattr(refits, "CANDIDATES", 25)
    screened = plan_of(subject, **options).edited()[0].errors[-1]
    assert sizes == [40]  # twice the width
    assert whole < screened < 1.5 * whole


def test_nothing_is_fitted_twice_and_a_stopped_plan_goes_on() -> None:
    memory: dict[str, Any] = {}
    subject = subject_of("qwen2_moe", remembered=memory)
    options = CLOSED | {"layers": [1, 2, 3], "experts": "neurons"}
    whole = plan_of(subject, **options)
    assert len(memory) == 3
    again = plan_of(subject._replace(profile=_closed(subject)), **options)
    assert again == whole and all(
        torch.equal(again.tensors[n], t) for n, t in whole.tensors.items()
    )
    memory.popitem()  # as if it had been stopped before the last layer
    resumed = plan_of(subject, **options)
    assert resumed == whole
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(resumed.tensors[name], tensor, rtol=0, atol=0)


def _closed(subject: Subject) -> Any:
    """The same profile, whose model nobody may open."""

    def refused(*_: object, **__: object) -> Any:
        raise AssertionError("everything is remembered")

    return type(subject.profile)(
        subject.profile.statistics, refused, remember=subject.profile.remember,
        remember_tensors=subject.profile.remember_tensors,
        num_documents=subject.profile.num_documents,
    )  # fmt: skip


def test_few_documents_and_families_without_a_dense_form_are_refused() -> None:
    with pytest.raises(UserError, match="has 3 documents"):
        plan_of(subject_of("qwen2_moe", documents=3), **CLOSED)
    with pytest.raises(UserError, match=r"in its own block.*condense\.refit=none"):
        plan_of(subject_of("gpt_oss"), **CLOSED)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"experts": "neurons"}, r"condense\.refit=down_proj, or condense=closed_form"),
        ({"width": 30}, r"condense\.experts=neurons"),
        ({"propagate": "block"}, r"condense\.refit=none: condense\.refit=down_proj"),
        ({"own_documents": 3}, r"condense\.refit=none fits nothing: condense\.refit=down_proj"),
        ({"own_documents": -1, "refit": "down_proj"}, "at least 0"),
        ({"own_weight": -0.1, "refit": "down_proj"}, "at least 0"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        plan_of(subject_of("qwen2_moe"), **options)


def test_the_width_of_a_condensed_layer() -> None:
    [info, *_] = [layer.info for layer in moe_layers(tiny_model("qwen2_moe"))]
    assert width_of(info, 2) == 24 + 2 * 16
    [info, *_] = [layer.info for layer in moe_layers(tiny_model("mixtral"))]
    assert width_of(info, 2) == 2 * 16
