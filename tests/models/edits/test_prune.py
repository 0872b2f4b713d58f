"""Pruning as an edit: what it says of itself (what it computes: tests of editing, remapped)."""

from __future__ import annotations

import dataclasses

import pytest
from families import tiny_model

from moe_lab.models.edits.base import Fate
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.models.layers import moe_layers
from moe_lab.types import UserError

PRUNE = PruneExperts(1, "model.layers.1.mlp", kept=(6, 1, 3, 4), scores=(0.5,) * 8)


def test_what_it_says_of_itself() -> None:
    replaced = dataclasses.replace(PRUNE, replacement="copy")
    assert (PRUNE.title, replaced.title) == ("prune", "prune (copy)")
    assert (PRUNE.keeps_rows, replaced.keeps_rows) == (False, True)
    assert (PRUNE.experts_kept, PRUNE.num_experts_left, PRUNE.trains) == (
        (6, 1, 3, 4),
        4,
        "experts",
    )
    assert (PRUNE.expert_scores, PRUNE.layer_score) == ((0.5,) * 8, None)
    assert dataclasses.replace(PRUNE, scores=(0.5,)).layer_score is None, "it is of one expert"
    assert [PRUNE.fate(expert) for expert in (0, 1)] == [Fate("removed"), Fate("kept")]


def test_what_it_leaves_is_what_it_foresees() -> None:
    model = tiny_model("qwen2_moe")
    replaced = dataclasses.replace(PRUNE, index=2, replacement="zero")
    nothing = dataclasses.replace(replaced, index=3, kept=tuple(range(8)))
    for edit in (PRUNE, replaced, nothing):
        before = {layer.info.index: layer for layer in moe_layers(model)}[edit.index]
        foreseen = edit.left(before.info)
        assert edit.apply(before, {}) is before.block
        after = {layer.info.index: layer.info for layer in moe_layers(model)}[edit.index]
        numbers = (after.num_experts, after.real_experts)
        assert numbers == (foreseen.num_experts, foreseen.real_experts)


def test_what_a_router_cannot_work_with_is_refused() -> None:
    info = moe_layers(tiny_model("qwen2_moe"))[0].info
    few = dataclasses.replace(PRUNE, kept=(6, 1))
    with pytest.raises(UserError, match="2 of 8 experts would stay, but its router chooses 3"):
        few.check(info)
    dataclasses.replace(few, replacement="zero").check(info)
    with pytest.raises(UserError, match="0 of 8 experts would stay"):
        dataclasses.replace(few, kept=(), replacement="zero").check(info)
