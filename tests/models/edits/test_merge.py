"""Merging as an edit: what it says of itself, and what it needs (averages: tests of merging)."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from families import logits_of, tiny_model

from moe_lab.models.checkpoint import meta_model
from moe_lab.models.edits.base import Fate
from moe_lab.models.edits.merge import MergeExperts
from moe_lab.models.edits.plan import Plan, apply_plan, restructure_model
from moe_lab.models.layers import moe_layers
from moe_lab.types import UserError

MERGE = MergeExperts(
    1, "model.layers.1.mlp", kept=(0, 3, 7), groups=((0, 1, 2), (3,), (7, 6, 5, 4)),
    weights=((0.5, 0.25, 0.25), (1.0,), (0.25,) * 4), align="none",
)  # fmt: skip


def test_what_it_says_of_itself() -> None:
    assert (MERGE.title, MERGE.experts_kept, MERGE.num_experts_left) == ("merge", (0, 3, 7), 3)
    assert MERGE.cells == {"groups merged": ["0+1+2", "7+6+5+4"]}
    assert sorted(set(MERGE.named_experts)) == list(range(8))
    assert [MERGE.fate(expert) for expert in (0, 1, 3, 4)] == [
        Fate("joined", 3), Fate("removed", into=0), Fate("kept", 1), Fate("removed", into=7),
    ]  # fmt: skip
    assert dataclasses.replace(MERGE, router="all").keeps_rows and not MERGE.keeps_rows


@pytest.mark.parametrize("align", ["activations", "both"])
@pytest.mark.parametrize("given", [None, (8, 15), (3, 16)])
def test_a_permutation_that_does_not_fit_is_refused(align: str, given: tuple | None) -> None:
    model = tiny_model("qwen2_moe")
    before = logits_of(model)
    edit = dataclasses.replace(MERGE, align=align)
    tensors = {} if given is None else {"layers.1.permutation": torch.zeros(given, dtype=int)}
    words = "is missing .plan.safetensors lies beside" if given is None else f"has .{given[0]}, "
    told = rf"layer 1 with align={align}: its tensor layers.1.permutation must .*\(8, 16\).*{words}"
    with pytest.raises(UserError, match=told):
        apply_plan(model, Plan((edit,), tensors=tensors))
    assert torch.equal(logits_of(model), before), "it is refused before anything is changed"


@pytest.mark.parametrize("router", ["all", "dominant", "mean"])
def test_its_structure_needs_no_weights(router: str) -> None:
    edit = dataclasses.replace(MERGE, align="both", router=router)
    empty, model = meta_model(tiny_model("qwen2_moe").config), tiny_model("qwen2_moe")
    restructure_model(empty, [edit])
    order = torch.arange(16).repeat(8, 1)
    apply_plan(model, Plan((edit,), tensors={"layers.1.permutation": order}))
    one, other = ({name: part.shape for name, part in each.state_dict().items()}
                  for each in (empty, model))  # fmt: skip
    assert one == other
    sizes = [(layer.info.num_experts, layer.info.real_experts) for layer in moe_layers(model)]
    assert sizes[0] == ((8, 3) if router == "all" else (3, 0))
