"""Experts that are gone while their router rows stay: what tokens get there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from families import EACH_FAMILY, logits_of, tiny_batch, tiny_model
from running import EditedModel
from stand_ins import GROUPS, KEPT, merged, replaced, slow_expert
from torch import Tensor, nn

from moe_lab.finetune.expert_dropping import ExpertDropping
from moe_lab.finetune.recipe import Phase
from moe_lab.models.checkpoint import load
from moe_lab.models.editing import constants_name, copied_layer
from moe_lab.models.edits.plan import Plan, apply_plan, check_plan
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.models.forms import form_of
from moe_lab.models.layers import MoELayer, check_kept, hidden_of, moe_layers, num_parameters
from moe_lab.models.observing import OBSERVING
from moe_lab.types import UserError


def slow_block(layer: MoELayer, x_TD: Tensor, kept: tuple[int, ...], stand_in) -> Tensor:
    """The intact layer, token by token, with stand_in(expert, x) for experts that are not kept."""
    _, weight_TK, index_TK = layer.router(x_TD)[:3]
    rows = []
    for x, weights, chosen in zip(x_TD, weight_TK, index_TK.tolist(), strict=True):
        y = torch.zeros_like(x)
        for weight, expert in zip(weights, chosen, strict=True):
            here = expert in kept
            y = y + weight * (slow_expert(layer, expert, x) if here else stand_in(expert, x))
        if layer.shared is not None:
            scale = 1.0 if layer.shared_gate is None else torch.sigmoid(layer.shared_gate(x))
            y = y + scale * layer.shared(x)
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("kind", KEPT)
@torch.no_grad()
def test_stand_ins_equal_a_slow_reference(family: str, kind: str) -> None:
    model = tiny_model(family).double()
    model.set_experts_implementation("eager")
    layer, x_TD = moe_layers(model)[0], torch.randn(40, 32, dtype=torch.float64)
    plan = replaced(model, kind)
    [edit] = plan.edits
    gone = sorted(set(range(8)) - set(edit.kept))

    def stand_in(expert: int, x: Tensor) -> Tensor:
        if kind == "copy":
            return x
        if kind == "zero":
            return torch.zeros_like(x)
        return plan.tensors[constants_name(edit.index)][gone.index(expert)].double()

    expected = slow_block(layer, x_TD, edit.kept, stand_in)
    before = hidden_of(layer.block(x_TD[None]))
    block = edit.apply(copied_layer(layer), plan.tensors)
    found = hidden_of(block(x_TD[None]))[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(hidden_of(layer.block(x_TD[None])), before)  # the layer itself stays
    apply_plan(model, plan)
    assert torch.equal(hidden_of(moe_layers(model)[0].block(x_TD[None]))[0], found)
    for implementation in ("grouped_mm", "batched_mm", OBSERVING):
        single = model.float()
        single.set_experts_implementation(implementation)
        found = hidden_of(moe_layers(single)[0].block(x_TD[None].float()))[0]
        torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)


@EACH_FAMILY
def test_zero_equals_no_weight_after_routing(family: str) -> None:
    model, batch = tiny_model(family), tiny_batch()
    kept = torch.tensor(KEPT["zero"])

    def mask(module: nn.Module, args: tuple, output: tuple) -> tuple:
        logits, weight_TK, index_TK, *rest = output
        return logits, weight_TK * torch.isin(index_TK, kept), index_TK, *rest

    layers = moe_layers(model)
    handles = [layer.router.register_forward_hook(mask) for layer in layers]
    expected = logits_of(model, batch)
    for handle in handles:
        handle.remove()
    apply_plan(model, replaced(model, *["zero"] * len(layers)))
    torch.testing.assert_close(logits_of(model, batch), expected, rtol=1e-5, atol=1e-5)


@EACH_FAMILY
def test_all_rows_of_identical_experts_make_a_merge_the_identity(family: str) -> None:
    model, batch = tiny_model(family), tiny_batch()
    with torch.no_grad():
        for layer in moe_layers(model):
            for tensor in layer.experts.parameters():
                for group in GROUPS:
                    tensor[list(group)] = tensor[group[0]].clone()
    before = logits_of(model, batch)
    apply_plan(model, merged(model))
    assert [layer.experts.num_experts for layer in moe_layers(model)] == [4] * len(
        moe_layers(model)
    )
    torch.testing.assert_close(logits_of(model, batch), before, rtol=1e-5, atol=1e-5)
    assert {layer.info.real_experts for layer in moe_layers(model)} == {4}
    assert {layer.info.num_experts for layer in moe_layers(model)} == {8}


def test_a_novice_of_an_expert_that_never_varies_changes_nothing() -> None:
    model, batch = tiny_model("gpt_oss"), tiny_batch()
    tensors = {}
    with torch.no_grad():
        for layer in moe_layers(model):
            gone = sorted(set(range(8)) - set(KEPT["constant"]))
            layer.experts.down_proj[gone] = 0.0  # their biases are all that they give
            tensors[constants_name(layer.info.index)] = layer.experts.down_proj_bias[gone].clone()
    before = logits_of(model, batch)
    plan = replaced(model, *["constant"] * 4)
    apply_plan(model, Plan(plan.edits, tensors=tensors))
    torch.testing.assert_close(logits_of(model, batch), before, rtol=1e-5, atol=1e-5)


def test_replacing_nothing_is_the_identity() -> None:
    model, batch = tiny_model("mixtral"), tiny_batch()
    before = logits_of(model, batch)
    edits = [
        PruneExperts(layer.info.index, layer.info.name, kept=tuple(range(8)), replacement="copy")
        for layer in moe_layers(model)
    ]
    assert form_of(model.config, edits).stock
    apply_plan(model, Plan(tuple(edits)))
    assert torch.equal(logits_of(model, batch), before)


def test_what_cannot_be_done_is_refused() -> None:
    model = tiny_model("mixtral")
    plan = replaced(model, "constant")
    with pytest.raises(UserError, match=r"layers.0.constants must have the shape \(4, 32\)"):
        apply_plan(model, Plan(plan.edits))
    short = {constants_name(0): torch.zeros(3, 32)}
    with pytest.raises(UserError, match=r"has \(3, 32\)"):
        apply_plan(tiny_model("mixtral"), Plan(plan.edits, tensors=short))
    model = tiny_model("mixtral")
    before = [layer.info for layer in moe_layers(model)]
    one = PruneExperts(0, before[0].name, kept=(5,), replacement="zero")
    check_plan(before, [one])  # fewer than top_k: the router still has rows enough
    with pytest.raises(UserError, match="0 of 8 experts would stay"):
        check_kept(before[0], 0, keeps_rows=True)
    apply_plan(model, plan)
    info = moe_layers(model)[0].info
    assert info.obstacle is not None
    with pytest.raises(UserError, match="cannot be pruned or merged once more"):
        check_kept(info, 6)
    for again in (PruneExperts(0, info.name, kept=(0, 1)), merged(model).edits[0]):
        with pytest.raises(UserError, match="cannot be pruned or merged once more"):
            apply_plan(model, Plan((again,)))
    recipe = ExpertDropping({"one": Phase(data=None)})
    with pytest.raises(UserError, match=r"method\.replacement=nothing"):
        recipe.check(plan)
    with pytest.raises(UserError, match="8 router rows lead to 4 experts"):
        recipe.check_model(model.config, [info])


def test_whole_jobs(job: Callable[..., EditedModel]) -> None:
    held_out = ["eval=perplexity", "eval.held_out.num_samples=4", "eval.held_out.max_length=24"]
    seer = ["finetune=seer", "finetune.top_k=1", "finetune.phases.lm.data.num_samples=8",
            "finetune.phases.lm.validation=null"]  # fmt: skip
    first = job("method.replacement=constant", "metric=reap", "ratio.ratio=0.5", *seer, *held_out)
    assert first.code == 0, first.text
    report = first.report
    assert report["compressed/stock"] is False and report["finetuned/stock"] is False
    assert report["compressed/eval/routing/top_k"] == 3
    assert 0 < report["compressed/eval/routing/stand_ins"] < 3
    assert report["finetuned/eval/routing/top_k"] == 1
    gone = 3 * 4 * (3 * 32 * 16 - 32)  # of three layers four experts, and what stands in for them
    dense, tuned = (load(report[f"{name}/checkpoint"]) for name in ("dense", "finetuned"))
    assert num_parameters(dense) - num_parameters(tuned) == gone
    [path] = (first.store / "compress").glob("*/checkpoint")
    # What it made is a model like others, but for losing experts once more.
    again = [f"model.path={path}", *held_out]
    plain = job(*again, "method=none")
    assert plain.code == 0, plain.text
    figure = "held_out/perplexity"
    assert plain.report[f"dense/eval/{figure}"] == report[f"compressed/eval/{figure}"]
    for method in ("method=prune", "method=merge", "method=condense"):
        refused = job(*again, method)
        assert refused.code == 2, method
        assert "router rows" in refused.text or "more rows" in refused.text, refused.text
        assert "too much" not in refused.text and "works with" not in refused.text, refused.text
    refused = job(*again, "method=none", "diagnose=full")
    assert refused.code == 2 and "diagnose.weights=false" in refused.text, refused.text
    sums = ("diagnose=full", "diagnose.weights=false", "diagnose.num_samples=0")
    looked = job(*again, "method=none", *sums)
    assert looked.code == 0 and looked.report["diagnosis/usage_deviation"] > 0, looked.text
