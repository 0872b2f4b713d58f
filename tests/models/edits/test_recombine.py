"""Recombining as an edit: what it says of itself, and that it is pruning where nothing joins."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from families import logits_of, tiny_model

from moe_lab.models.edits.base import Fate
from moe_lab.models.edits.narrow import NarrowExperts
from moe_lab.models.edits.plan import Plan, apply_plan, read_edit, restructure_model
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.models.edits.recombine import RecombineExperts
from moe_lab.models.layers import moe_layers
from moe_lab.types import UserError

NAME = "model.layers.1.mlp"
EDIT = RecombineExperts(1, NAME, kept=(6, 1, 3, 4), threshold=-1.0, scores=(0.5, 1.0) * 4)


def applied(model: torch.nn.Module, edit: object) -> torch.nn.Module:
    changed = copy.deepcopy(model)
    apply_plan(changed, Plan((edit,)))  # type: ignore[arg-type]
    return changed


def test_what_it_says_of_itself() -> None:
    assert (EDIT.title, EDIT.num_experts_left, EDIT.keeps_rows) == (
        "recombine (above -1)",
        4,
        False,
    )
    assert [EDIT.fate(expert) for expert in (0, 1)] == [Fate("removed"), Fate("kept")]
    assert EDIT.expert_scores == (0.5, 1.0) * 4
    assert read_edit(EDIT.to_json()) == EDIT


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_above_all_cosines_it_is_pruning(family: str) -> None:
    model = tiny_model(family)
    name = moe_layers(model)[1].info.name
    none = dataclasses.replace(EDIT, name=name, threshold=1.01)
    pruned = applied(model, PruneExperts(1, name, kept=EDIT.kept))
    assert torch.equal(logits_of(applied(model, none)), logits_of(pruned))
    some = applied(model, dataclasses.replace(EDIT, name=name))
    assert not torch.allclose(logits_of(some), logits_of(pruned))
    after, expected = (moe_layers(one)[1] for one in (some, pruned))
    assert torch.equal(after.router.weight, expected.router.weight)
    assert after.info == expected.info


def test_all_experts_stay_as_they_are() -> None:
    model = tiny_model("mixtral")
    name = moe_layers(model)[1].info.name
    every = dataclasses.replace(EDIT, name=name, kept=tuple(range(8)))
    assert torch.equal(logits_of(applied(model, every)), logits_of(model))


def test_without_scores_all_weigh_alike() -> None:
    model = tiny_model("mixtral")
    name = moe_layers(model)[1].info.name
    alike = dataclasses.replace(EDIT, name=name, scores=(0.25,) * 8)
    none = dataclasses.replace(alike, scores=())
    assert torch.equal(logits_of(applied(model, alike)), logits_of(applied(model, none)))
    weighed = applied(model, dataclasses.replace(EDIT, name=name))
    assert not torch.equal(logits_of(weighed), logits_of(applied(model, none)))


def test_what_a_router_cannot_work_with_is_refused() -> None:
    info = moe_layers(tiny_model("qwen2_moe"))[0].info
    with pytest.raises(UserError, match="2 of 8 experts would stay, but its router chooses 3"):
        dataclasses.replace(EDIT, kept=(6, 1)).check(info)


def test_experts_of_different_widths_are_refused_before_any_weight_is_read() -> None:
    model = tiny_model("mixtral")
    narrow = NarrowExperts(1, NAME, widths=(16, 8) * 4)
    with pytest.raises(UserError, match=r"different numbers of hidden units.*method=merge"):
        restructure_model(model.to("meta"), [narrow, EDIT])
    even = NarrowExperts(1, NAME, widths=(8,))
    restructure_model(model, [even])
    restructure_model(model, [EDIT])
    assert moe_layers(model)[1].info.num_experts == 4
