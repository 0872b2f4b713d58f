"""Condensed layers behind one another, remembered, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from fitted_layers import (
    Seen,
    Subject,
    batch_of,
    by_hand,
    edited,
    output_weights,
    plan_of,
    seen_at,
    subject_of,
)

from moe_lab.models.dense_units import columns_name, units_name
from moe_lab.profile.documents import to_fit_and_choose
from moe_lab.profile.own_text import own_text
from moe_lab.types import UserError

DENSE = ["qwen2_moe", "mixtral", "deepseek_v3"]
LAYER = 2
NEARLY_NONE = 1e-9
CLOSED = {"refit": "down_proj", "layers": [LAYER], "ridge": NEARLY_NONE}


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
    expected = by_hand(subject, LAYER, plan.tensors[units_name(LAYER)].long(), seen, weight_T)
    torch.testing.assert_close(
        plan.tensors[columns_name(LAYER)].double(), expected.T, rtol=1e-3, atol=1e-5
    )


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
    expected = by_hand(subject, LAYER, plan.tensors[units_name(LAYER)].long(), both, weight_T)
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


def test_more_own_text_is_another_answer() -> None:
    subject = subject_of("qwen2_moe", remembered={})
    options: dict[str, Any] = CLOSED | {"propagate": "none"}
    some, more = (plan_of(subject, **options, own_documents=n) for n in (6, 12))
    assert not torch.equal(some.tensors[columns_name(LAYER)], more.tensors[columns_name(LAYER)])


def test_a_model_in_bfloat16_is_summed_up_in_float32() -> None:
    options: dict[str, Any] = CLOSED | {"layers": [1, LAYER], "experts": [0, 1, 2]}
    exact = plan_of(subject_of("qwen2_moe", documents=30), **options)
    rough = plan_of(subject_of("qwen2_moe", documents=30, dtype=torch.bfloat16), **options)
    for one, other in zip(exact.edited(), rough.edited(), strict=True):
        assert other.errors == pytest.approx(one.errors, rel=0.05)
    assert {tensor.dtype for tensor in rough.tensors.values()} == {torch.float32, torch.int32}


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
