"""Experts that are gone while their router rows stay: what tokens get there, saved and trained."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Outcome
from families import FAMILIES, tiny_batch, tiny_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from moe_lab.compute import Compute
from moe_lab.evaluate.held_out import compare_held_out
from moe_lab.finetune.expert_dropping import ExpertDropping
from moe_lab.finetune.experts import Experts
from moe_lab.finetune.recipe import Phase
from moe_lab.measure import active_parameters, flops_per_token
from moe_lab.models.checkpoint import check_plan, load, resolve
from moe_lab.models.editing import apply_plan, constants_name, edited_block
from moe_lab.models.forms import form_of
from moe_lab.models.layers import MoELayer, check_kept, hidden_of, moe_layers, num_parameters
from moe_lab.models.observing import OBSERVING
from moe_lab.models.routers import set_top_k
from moe_lab.models.saving import save_checkpoint
from moe_lab.profile.collect import collect_statistics
from moe_lab.stages.profile import collect_profile as profile
from moe_lab.types import Edit, Plan, UserError

EACH_FAMILY = pytest.mark.parametrize("family", FAMILIES)
KEPT = {"constant": (6, 1, 3, 4), "copy": (0, 2, 5, 7, 1), "zero": (3, 2, 0)}
GROUPS = ((0, 1, 2), (3,), (5, 4), (7, 6))  # within the two router groups of deepseek_v3


def logits_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


def replaced(model: nn.Module, *kinds: str) -> Plan:
    """A plan that replaces experts of the first MoE layers, a kind for each."""
    edits, tensors = [], {}
    for layer, kind in zip(moe_layers(model), kinds, strict=False):
        index, kept = layer.info.index, KEPT[kind]
        edits.append(Edit(index, layer.info.name, "prune", kept=kept, replacement=kind))
        if kind == "constant":
            generator = torch.Generator().manual_seed(index)
            tensors[constants_name(index)] = torch.randn(8 - len(kept), 32, generator=generator)
    return Plan(tuple(edits), tensors=tensors)


def merged(model: nn.Module, router: str = "all") -> Plan:
    kept = tuple(group[0] for group in GROUPS)
    weights = tuple((1 / len(group),) * len(group) for group in GROUPS)
    edits = (
        Edit(one.info.index, one.info.name, "merge", kept=kept, groups=GROUPS, weights=weights,
             router=router)
        for one in moe_layers(model)
    )  # fmt: skip
    return Plan(tuple(edits))


def slow_expert(layer: MoELayer, expert: int, x: Tensor) -> Tensor:
    """One expert on one token, written from the families' descriptions."""
    experts = layer.experts
    into, down = experts.gate_up_proj[expert], experts.down_proj[expert]
    if layer.info.family == "gpt_oss":
        both = x @ into + experts.gate_up_proj_bias[expert]
        gate, up = both[0::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
        return ((up + 1) * gate * torch.sigmoid(1.702 * gate)) @ down + experts.down_proj_bias[
            expert
        ]
    width = into.shape[0] // 2
    return down @ (F.silu(into[:width] @ x) * (into[width:] @ x))


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
    block = edited_block(layer, edit, plan.tensors)
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
        Edit(layer.info.index, layer.info.name, "prune", kept=tuple(range(8)), replacement="copy")
        for layer in moe_layers(model)
    ]
    assert form_of(model.config, edits).stock
    apply_plan(model, Plan(tuple(edits)))
    assert torch.equal(logits_of(model, batch), before)


# Loads every folder with stock transformers alone, then again after `import moe_lab`.
FRESH = """
import json, sys
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

def load_all():
    found = {}
    for folder in sys.argv[1:]:
        want = load_file(folder + "/expected.safetensors")
        read = AutoModelForCausalLM.from_pretrained
        try:
            model, info = read(folder + "/model", output_loading_info=True)
        except RuntimeError as error:
            found[folder] = "refused"
            continue
        with torch.no_grad():
            got = model(input_ids=want["input_ids"], attention_mask=want["attention_mask"]).logits
        clean = not info["missing_keys"] and not info["unexpected_keys"]
        found[folder] = float((got - want["logits"]).abs().max()) if clean else str(info)
    return found

stock = load_all()
assert "moe_lab" not in sys.modules
import moe_lab
print("RESULT" + json.dumps([stock, load_all()]))
"""


def saved(family: str, folder: Path) -> tuple[nn.Module, Plan, str]:
    """A model with constants, with copies, and in all other layers merged experts, on disk."""
    folder.mkdir()
    model = tiny_model(family)
    model.save_pretrained(folder / "source")
    first = replaced(model, "constant", "copy")
    plan = Plan((*first.edits, *merged(model).edits[2:]), tensors=first.tensors)
    foreseen = form_of(model.config, plan.edits)
    apply_plan(model, plan)
    batch = tiny_batch()
    save_file(batch | {"logits": logits_of(model, batch)}, folder / "expected.safetensors")
    form = save_checkpoint(model, folder / "model", folder / "source")
    assert not form.stock
    assert form.reason == foreseen.reason
    return model, plan, form.reason


def test_every_family_is_read_again_by_us_and_refused_by_stock(tmp_path: Path) -> None:
    folders = [tmp_path / family for family in FAMILIES]
    for folder in folders:
        reason = saved(folder.name, folder)[2]
        assert "method.replacement=nothing" in reason
        assert "method.router=dominant" in reason
    arguments = [sys.executable, "-c", FRESH, *map(str, folders)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    stock, ours = json.loads(done.stdout.split("RESULT")[1])
    assert ours == {str(folder): 0.0 for folder in folders}
    assert stock == {str(folder): "refused" for folder in folders}


@pytest.mark.parametrize("family", ["gpt_oss", "qwen2_moe"])
def test_what_was_read_works_as_any_model(family: str, tmp_path: Path) -> None:
    made, _, _ = saved(family, tmp_path / "x")
    model, batch = load(tmp_path / "x" / "model"), tiny_batch()
    assert [one.info for one in moe_layers(model)] == [one.info for one in moe_layers(made)]
    prompt = tiny_batch(padding=False, batch=1)
    outputs = [
        model.generate(**prompt, max_new_tokens=8, do_sample=False, use_cache=cache)
        for cache in (True, False)
    ]
    assert torch.equal(*outputs)
    set_top_k(model, 1)
    assert not torch.equal(logits_of(model, batch), logits_of(made, batch))
    with pytest.raises(UserError, match="top_k=9"):
        set_top_k(model, 9)
    assert not save_checkpoint(model, tmp_path / "again", tmp_path / "x" / "model").stock
    assert torch.equal(logits_of(load(tmp_path / "again"), batch), logits_of(model, batch))


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_the_model_shrinks_by_the_experts_that_go(family: str) -> None:
    model = tiny_model(family)
    parameters, active, flops = (
        count(model)
        for count in (num_parameters, active_parameters, lambda m: flops_per_token(m, 8))
    )
    expert = 3 * 32 * 16 + (2 * 16 + 32 if family == "gpt_oss" else 0)
    plan = replaced(model, "constant", "copy")
    apply_plan(model, plan)
    assert parameters - num_parameters(model) == (4 + 3) * expert - 4 * 32
    # The most that a token can use, as one that is sent to no stand-in.
    assert active_parameters(model) == active
    assert flops_per_token(model, 8) == flops + 2 * 4 * 32  # the four constants' own product


def test_training_reaches_the_experts_that_stay(tmp_path: Path) -> None:
    model, plan, _ = saved("qwen2_moe", tmp_path / "x")
    model = load(tmp_path / "x" / "model")
    model.requires_grad_(False)
    tuning = Experts({"one": Phase(data=None)}).prepare(model, plan)
    batch = tiny_batch() | {"labels": tiny_batch()["input_ids"]}
    routers = {f"{one.info.name}.gate": one.router.weight for one in moe_layers(model)}
    trained = tuning.trainable | routers
    gradients = {}
    for implementation in ("eager", OBSERVING):
        model.set_experts_implementation(implementation)
        for parameter in trained.values():
            parameter.requires_grad_(True)
            parameter.grad = None
        model(**batch).loss.backward()
        gradients[implementation] = {name: p.grad for name, p in trained.items()}
    assert any("constants" in name for name in trained)
    for name, gradient in gradients[OBSERVING].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, gradients["eager"][name], rtol=1e-4, atol=1e-6)
    before = logits_of(model, tiny_batch())
    with torch.no_grad():
        for parameter in tuning.trainable.values():
            parameter -= 0.1 * parameter.grad
    after = logits_of(model, tiny_batch())
    assert not torch.equal(before, after)
    save_checkpoint(model, tmp_path / "tuned", tmp_path / "x" / "model")
    model = load(tmp_path / "tuned")
    model.set_experts_implementation(OBSERVING)
    assert torch.equal(logits_of(model, tiny_batch()), after)


@torch.no_grad()
def test_statistics_count_every_row_as_an_expert(tmp_path: Path) -> None:
    saved("deepseek_v2", tmp_path / "x")
    model, batch = load(tmp_path / "x" / "model"), tiny_batch(padding=False)
    seen: dict[int, tuple[Tensor, ...]] = {}
    handles = [
        layer.experts.register_forward_pre_hook(
            lambda module, args, index=layer.info.index: seen.update({index: args})
        )
        for layer in moe_layers(model)
    ]
    found = collect_statistics(model, [batch])
    for handle in handles:
        handle.remove()
    for layer, one in zip(moe_layers(model), found, strict=True):
        x_TD, index_TK, weight_TK = seen[layer.info.index]
        count, norm = torch.zeros(8), torch.zeros(8, dtype=torch.float64)
        for x, rows, weights in zip(x_TD, index_TK.tolist(), weight_TK, strict=True):
            for row, weight in zip(rows, weights, strict=True):
                count[row] += 1
                norm[row] += weight * slow_row(layer, row, x).norm()
        assert one["count"].tolist() == count.tolist()
        torch.testing.assert_close(one["gate_norm_sum"], norm, rtol=1e-5, atol=1e-5)
    figures = compare_held_out(model, model, [batch]).figures
    gone = sum(
        (layer.experts.place_E[seen[layer.info.index][1]] >= layer.experts.num_experts).sum()
        for layer in moe_layers(model)
    )
    assert figures["routing/stand_ins"] == pytest.approx(int(gone) / 30 / len(found))
    # Layer by layer from the checkpoint it is the same.
    compute = Compute(layerwise=True, device="cpu")
    streamed = profile(resolve(tmp_path / "x" / "model"), [(0, batch)], False, compute, tmp_path)
    for one, other in zip(found, streamed.of_group(), strict=True):
        assert one.sums.keys() == other.sums.keys()
        for name in one.sums:
            assert torch.equal(one[name], other[name]), name


def slow_row(layer: MoELayer, row: int, x: Tensor) -> Tensor:
    place, number = int(layer.experts.place_E[row]), layer.experts.num_experts
    if place < number:
        return slow_expert(layer, place, x)
    stand_in = layer.experts.stand_in
    if stand_in == "constant":
        return layer.experts.constants[place - number]
    return x if stand_in == "copy" else torch.zeros_like(x)


def test_a_plan_keeps_its_tensors_beside_it(tmp_path: Path) -> None:
    plan = replaced(tiny_model("mixtral"), "constant", "zero")
    plan.write_tensors(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text(plan.to_text())
    read = Plan.load(tmp_path / "plan.json")
    assert read == plan
    [name] = read.tensors
    assert torch.equal(read.tensors[name], plan.tensors[name])
    plain = Plan((Edit(0, "x", "prune", kept=(1, 2)),))
    plain.write_tensors(tmp_path / "other.json")
    assert not (tmp_path / "other.safetensors").exists()
    assert "replacement" not in plain.to_text()


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
    one = Edit(0, before[0].name, "prune", kept=(5,), replacement="zero")
    check_plan(before, [one])  # fewer than top_k: the router still has rows enough
    with pytest.raises(UserError, match="0 of 8 experts would stay"):
        check_kept(before[0], 0, keeps_rows=True)
    apply_plan(model, plan)
    info = moe_layers(model)[0].info
    assert info.obstacle is not None
    with pytest.raises(UserError, match="cannot be pruned or merged once more"):
        check_kept(info, 6)
    for again in (Edit(0, info.name, "prune", kept=(0, 1)), merged(model).edits[0]):
        with pytest.raises(UserError, match="cannot be pruned or merged once more"):
            apply_plan(model, Plan((again,)))
    recipe = ExpertDropping({"one": Phase(data=None)})
    with pytest.raises(UserError, match=r"method\.replacement=nothing"):
        recipe.check(plan)
    with pytest.raises(UserError, match="8 router rows lead to 4 experts"):
        recipe.check_model(model.config, [info])


def test_whole_jobs(job: Callable[..., Outcome]) -> None:
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
