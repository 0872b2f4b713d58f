"""The edit narrow: what it refuses, writes and carries out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import logits_of, tiny_model
from narrowing import UNEVEN, narrow_plan

from moe_lab.models.edits.narrow import NarrowExperts
from moe_lab.models.edits.plan import Plan, apply_plan, check_plan, restructure_model
from moe_lab.models.layers import moe_layers
from moe_lab.models.narrowing import down_proj_name, neurons_name
from moe_lab.models.widths import widths_of
from moe_lab.types import UserError


def test_removing_none_changes_no_bit() -> None:
    model = tiny_model("qwen2_moe")
    expected = logits_of(model)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    apply_plan(model, narrow_plan(model, (16,) * 8, shared=24))
    assert torch.equal(logits_of(model), expected)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_it_is_written_and_read_back(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    plan = narrow_plan(model, UNEVEN)
    (tmp_path / "plan.json").write_text(plan.to_text())
    plan.write_tensors(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again.edits == plan.edits
    other = tiny_model("mixtral")
    apply_plan(model, plan)
    apply_plan(other, again)
    assert torch.equal(logits_of(model), logits_of(other))


def test_without_weights_the_widths_are_the_same() -> None:
    model, other = tiny_model("gpt_oss"), tiny_model("gpt_oss").to("meta")
    plan = narrow_plan(model, UNEVEN)
    apply_plan(model, plan)
    restructure_model(other, plan.edits)
    for one, two in zip(moe_layers(model), moe_layers(other), strict=True):
        assert widths_of(one.experts) == widths_of(two.experts) == UNEVEN
        assert one.info.expert_bytes == two.info.expert_bytes


def test_units_in_another_order_leave_another_order_of_the_same() -> None:
    model, other = tiny_model("mixtral"), tiny_model("mixtral")
    plan, order = narrow_plan(model, (8,) * 8), torch.randperm(16)
    from moe_lab.models.hidden_units import HiddenUnits

    for layer in moe_layers(other):
        HiddenUnits(layer.experts).keep(order.expand(8, 16))
    permuted = {name: one[:, order] for name, one in plan.tensors.items()}
    apply_plan(model, plan)
    apply_plan(other, Plan(plan.edits, tensors=permuted))
    torch.testing.assert_close(logits_of(model), logits_of(other), rtol=1e-5, atol=1e-5)


def test_a_new_down_projection_takes_the_place_of_the_old() -> None:
    model = tiny_model("mixtral")
    layer = moe_layers(model)[1].info
    plan = narrow_plan(model, {layer.index: (8,) * 8})
    new_EDW = torch.randn(8, 32, 8)
    tensors = plan.tensors | {down_proj_name(layer.index): new_EDW}
    edit = NarrowExperts(layer.index, layer.name, (8,), None, refitted=True)
    apply_plan(model, Plan((edit,), tensors=tensors))
    assert torch.equal(moe_layers(model)[1].experts.down_proj, new_EDW)


@pytest.mark.parametrize(
    ("widths", "shared", "words"),
    [
        ((8, 8), None, "2 widths for 8 experts"),
        ((17,), None, "have 16 hidden units and keep 0 to 16"),
        ((0,), None, "at least one in all"),
        ((8,), 25, "shared experts have 24 hidden units and keep 1 to 24"),
    ],
)
def test_widths_that_cannot_be_are_refused(
    widths: tuple[int, ...], shared: int | None, words: str
) -> None:
    info = moe_layers(tiny_model("qwen2_moe"))[0].info
    with pytest.raises(UserError, match=words):
        check_plan([info], [NarrowExperts(info.index, info.name, widths, shared)])


def test_a_tensor_of_another_number_of_units_is_refused() -> None:
    model = tiny_model("mixtral")
    plan = narrow_plan(model, (8,) * 8)
    name = neurons_name(0)
    with pytest.raises(UserError, match="names another number of units"):
        apply_plan(model, Plan(plan.edits, tensors=plan.tensors | {name: torch.ones(8, 16)}))
    with pytest.raises(UserError, match=r"plan\.safetensors lies beside plan\.json"):
        apply_plan(model, Plan(plan.edits))
