"""An edited model in the form in which it is saved."""

from __future__ import annotations

import torch
from edited_models import condense, moe_indices
from families import logits_of, tiny_model

from moe_lab.models.edits.plan import Plan, apply_plan, read_edit
from moe_lab.models.forms import choose_form
from moe_lab.models.in_form import in_form, native_block
from moe_lab.models.layers import moe_layers


def edited(padding: float) -> tuple[torch.Tensor, torch.nn.Module, object]:
    model = tiny_model("qwen3_moe")
    names = {one.info.index: one.info.name for one in moe_layers(model)}
    some = moe_indices("qwen3_moe")[1:3]
    edits = [{**condense(i, [5, 2, 6][: 2 + n]), "name": names[i]} for n, i in enumerate(some)]
    for edit in edits:
        edit["shared_gate"] = 1.0
    apply_plan(model, Plan(tuple(read_edit(edit) for edit in edits)))
    return logits_of(model), model, choose_form(model, padding)


def test_dense_layers_become_the_familys_own_and_compute_the_same() -> None:
    before, model, form = edited(padding=0.5)
    assert form.stock
    whole = in_form(model, form)
    kinds = {type(whole.get_submodule(f"model.layers.{i}.mlp")).__name__ for i in (1, 2)}
    assert kinds == {"Qwen3MoeMLP"}
    widths = {whole.get_submodule(f"model.layers.{i}.mlp").up_proj.out_features for i in (1, 2)}
    assert len(widths) == 1, "the narrower one has zeros"
    assert torch.allclose(logits_of(whole), before, atol=1e-5)


def test_what_our_own_form_says_stays_as_it_is() -> None:
    before, model, form = edited(padding=0.0)
    assert not form.stock
    whole = in_form(model, form)
    assert type(whole.get_submodule("model.layers.1.mlp")).__name__ == "DenseMLP"
    assert torch.equal(logits_of(whole), before)


def test_a_block_is_filled_with_zeros_behind_its_own_rows() -> None:
    _, model, form = edited(padding=0.5)
    name = "model.layers.1.mlp"
    narrow = model.get_submodule(name).down_proj.weight.detach().clone()
    built = in_form(edited(padding=0.5)[1], form).get_submodule(name)
    wide = native_block(model, name, built).down_proj.weight
    assert torch.equal(wide[:, : narrow.shape[1]], narrow)
    assert not wide[:, narrow.shape[1] :].any()
