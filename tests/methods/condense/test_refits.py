"""Condensed layers behind one another, remembered, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fitted_layers import (
    Seen,
    Subject,
    by_hand,
    edited,
    output_weights,
    plan_of,
    seen_at,
    subject_of,
)

from moe_lab.models.dense_units import columns_name, units_name
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
