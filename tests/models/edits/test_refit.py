"""The edit refit: what it writes, refuses and carries out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import logits_of, tiny_model
from narrowing import UNEVEN, narrow_plan
from odd_blocks import odd_model
from torch import Tensor

from moe_lab.models.edits.chain import Chain
from moe_lab.models.edits.plan import Plan, apply_plan, check_plan, read_edit, restructure_model
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.models.edits.refit import RefitExperts
from moe_lab.models.layers import moe_layers
from moe_lab.models.refitting import refit_name, shared_refit_name
from moe_lab.models.widths import widths_of
from moe_lab.types import UserError


def own_columns(model, index: int) -> Tensor:
    [layer] = [one for one in moe_layers(model) if one.info.index == index]
    return layer.experts.down_proj.detach().clone()


def test_it_is_written_and_read_back(tmp_path: Path) -> None:
    whole = RefitExperts(1, "a", True, ((0.1, "mean"), (1.0, "unit")), 0.0, 0.75)
    bare = RefitExperts(1, "a")
    assert bare.to_json() == {"index": 1, "name": "a", "edit": "refit"}
    assert whole.to_json()["error"] == 0.0  # a share of nothing is a share
    (tmp_path / "plan.json").write_text(Plan((whole, bare)).to_text())
    assert Plan.load(tmp_path / "plan.json").edits == (whole, bare)


def test_what_is_shown_of_it() -> None:
    ridges = ((0.1, "mean"), (1.0, "unit"), (0.1, "mean"))
    cells = RefitExperts(1, "a", True, ridges, 0.54321, 0.75).cells
    assert cells == {"ridge": ["0.1 (mean)", "1 (unit)"], "error left": [0.5432, 0.75]}
    assert RefitExperts(1, "a").cells == {}


def test_it_follows_other_edits_of_the_layer_and_leaves_their_fates() -> None:
    model = tiny_model("qwen2_moe")
    info = moe_layers(model)[0].info
    prune = PruneExperts(info.index, info.name, (1, 2, 5, 7))
    new_EDI, new_DI = torch.randn(4, 32, 16), torch.randn(32, 24)
    tensors = {refit_name(info.index): new_EDI, shared_refit_name(info.index): new_DI}
    plan = Plan((prune, RefitExperts(info.index, info.name, shared=True)), tensors=tensors)
    check_plan([info], plan.edits)
    apply_plan(model, plan)
    layer = moe_layers(model)[0]
    assert torch.equal(layer.experts.down_proj, new_EDI)
    assert torch.equal(layer.shared.down_proj.weight, new_DI)
    chain = Chain(plan.edits)
    assert [chain.fate(e).state for e in range(3)] == ["removed", "kept", "kept"]
    assert chain.num_experts_left == 4


def test_experts_that_are_transposed_get_the_same_columns() -> None:
    model = tiny_model("gpt_oss")
    info = moe_layers(model)[0].info
    new_EDI = torch.randn(8, 32, 16)
    edit = RefitExperts(info.index, info.name)
    apply_plan(model, Plan((edit,), tensors={refit_name(info.index): new_EDI}))
    assert torch.equal(moe_layers(model)[0].experts.down_proj, new_EDI.transpose(1, 2))


def test_zeros_behind_the_units_of_narrow_experts_stay_zeros() -> None:
    model = tiny_model("mixtral")
    plan = narrow_plan(model, UNEVEN)
    edits, tensors = list(plan.edits), dict(plan.tensors)
    for info in (layer.info for layer in moe_layers(model)):
        edits.append(RefitExperts(info.index, info.name))
        tensors[refit_name(info.index)] = torch.ones(8, 32, max(UNEVEN))
    apply_plan(model, Plan(tuple(edits), tensors=tensors))
    for layer in moe_layers(model):
        assert widths_of(layer.experts) == UNEVEN
        for width, down_DI in zip(UNEVEN, layer.experts.down_proj, strict=True):
            assert bool((down_DI[:, :width] == 1).all()) and not bool(down_DI[:, width:].any())


def test_a_tensor_of_another_shape_is_refused_and_nothing_is_changed() -> None:
    model = tiny_model("mixtral")
    info = moe_layers(model)[0].info
    before = logits_of(model)
    for tensors in ({}, {refit_name(info.index): torch.zeros(8, 16, 32)}):
        with pytest.raises(UserError, match=r"must have the shape \(8, 32, 16\)"):
            apply_plan(model, Plan((RefitExperts(info.index, info.name),), tensors=tensors))
    shared = RefitExperts(info.index, info.name, shared=True)
    tensors = {refit_name(info.index): own_columns(model, info.index)}
    with pytest.raises(UserError, match="whose shared experts are no plain or gated MLP"):
        apply_plan(model, Plan((shared,), tensors=tensors))
    assert torch.equal(logits_of(model), before)


def test_without_weights_a_block_that_does_more_than_add_is_refused() -> None:
    for kind in ("a norm", "a limit", "a sequence's length"):
        model = odd_model(kind).to("meta")
        edit = read_edit(RefitExperts(1, moe_layers(model)[0].info.name).to_json())
        with pytest.raises(UserError, match=r"does more with its experts.*method\.refit=false"):
            restructure_model(model, [edit])
