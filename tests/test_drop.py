"""Dropping MoE sublayers and whole decoder layers: which, what is computed then, and saving it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Outcome
from families import FAMILIES, tiny_batch, tiny_model
from safetensors.torch import load_file
from test_checkpoint import edited, in_fresh_process
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from moe_lab.methods.drop_blocks import DropBlocks
from moe_lab.methods.drop_layers import DropLayers
from moe_lab.models.checkpoint import load
from moe_lab.models.editing import apply_plan
from moe_lab.models.layers import moe_layers
from moe_lab.models.saving import save_checkpoint
from moe_lab.profile.collect import collect_statistics
from moe_lab.profile.profile import Profile
from moe_lab.types import Edit, LayerInfo, Plan, UserError

EACH_FAMILY = pytest.mark.parametrize("family", FAMILIES)
INFOS = [LayerInfo(i, f"model.layers.{i}.mlp", 8, 2, 32, num_decoders=4) for i in (1, 2, 3)]


def drop(kind: str, index: int) -> dict:
    return {"index": index, "edit": kind}


def applied(family: str, edits: list[dict]) -> torch.nn.Module:
    model = tiny_model(family)
    names = {layer.info.index: layer.info.name for layer in moe_layers(model)}
    apply_plan(model, Plan(tuple(Edit(name=names[edit["index"]], **edit) for edit in edits)))
    return model


def logits_of(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**tiny_batch()).logits


def passes_by(module: torch.nn.Module, args: tuple, output: object) -> object:
    """A hook with which a decoder layer changes nothing."""
    return (args[0], *output[1:]) if isinstance(output, tuple) else args[0]


def adds_nothing(module: torch.nn.Module, args: tuple, output: object) -> object:
    """A hook with which an MoE block changes nothing."""
    pair = isinstance(output, tuple)
    return (output[0] * 0, *output[1:]) if pair else output * 0


@EACH_FAMILY
def test_dropped_parts_change_nothing_any_more(family: str) -> None:
    for kind, part, hook in (
        ("drop_layer", "block", adds_nothing),
        ("drop_block", "decoder", passes_by),
    ):
        reference = tiny_model(family)
        layers = {layer.info.index: layer for layer in moe_layers(reference)}
        before = logits_of(reference)
        for index in (1, 3):
            getattr(layers[index], part).register_forward_hook(hook)
        model = applied(family, [drop(kind, 1), drop(kind, 3)])
        assert torch.equal(logits_of(model), logits_of(reference))
        assert not torch.equal(logits_of(model), before)
        gone = {"drop_layer": [i for i in layers if i not in (1, 3)]}
        gone["drop_block"] = list(range(len(gone["drop_layer"])))
        if family in ("qwen2_moe", "deepseek_v2", "deepseek_v3", "glm4_moe"):
            gone["drop_block"] = [1]  # the dense layer 0 stays the first
        assert [layer.info.index for layer in moe_layers(model)] == gone[kind]


@EACH_FAMILY
def test_generating_with_the_cache_equals_without(family: str) -> None:
    for kind in ("drop_block", "drop_layer"):
        model = applied(family, [drop(kind, 1)])
        prompt = tiny_batch(padding=False, batch=1)
        outputs = [
            model.generate(**prompt, max_new_tokens=6, do_sample=False, use_cache=cache)
            for cache in (True, False)
        ]
        assert torch.equal(*outputs)


def test_dropped_blocks_are_stock_in_every_family(tmp_path: Path) -> None:
    folders = [tmp_path / family for family in FAMILIES]
    for folder in folders:
        assert edited(folder.name, [drop("drop_block", 1), drop("drop_block", 2)], folder)
        config = json.loads((folder / "model" / "config.json").read_text())
        assert config["num_hidden_layers"] == 2
        assert len(config.get("layer_types", [0, 0])) == 2
        dense = tiny_model(folder.name)
        before = sum(parameter.numel() for parameter in dense.parameters())
        gone = sum(p.numel() for layer in moe_layers(dense) if layer.info.index in (1, 2)
                   for p in layer.decoder.parameters())  # fmt: skip
        after = sum(parameter.numel() for parameter in load(folder / "model").parameters())
        assert after == before - gone
    assert in_fresh_process("stock", folders) == dict.fromkeys(FAMILIES, 0.0)


def test_dropped_layers_are_saved_in_the_smallest_form_that_loads(tmp_path: Path) -> None:
    """Zeros as wide as the dense layer 0 would not be small; one unit where there is none is."""
    stock = {"qwen3_moe": True} | dict.fromkeys(["qwen2_moe", "mixtral", "olmoe", "gpt_oss"], False)
    stock |= {"deepseek_v2": False, "deepseek_v3": False}
    folders = [tmp_path / family for family in stock]
    for folder in folders:
        edits = [drop("drop_layer", 1), drop("drop_layer", 2)]
        assert edited(folder.name, edits, folder, 0.01) == stock[folder.name]
        model = load(folder / "model")  # warnings are errors: no tensor of no size is made
        expected = load_file(folder / "expected.safetensors")
        assert torch.equal(logits_of(model), expected["logits"])
        if not stock[folder.name]:
            in_memory = applied(folder.name, edits)
            assert sum(p.numel() for p in model.parameters()) == sum(
                p.numel() for p in in_memory.parameters()
            )
            assert not any(p.numel() == 0 for p in model.parameters())
    assert in_fresh_process("ours", folders) == dict.fromkeys(stock, 0.0)
    assert in_fresh_process("stock", folders[:1]) == {"qwen3_moe": 0.0}
    assert edited("qwen2_moe", [drop("drop_layer", 1)], tmp_path / "padded", 1.0)
    assert in_fresh_process("stock", [tmp_path / "padded"]) == {"padded": 0.0}


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "deepseek_v2"])
def test_the_most_similar_goes_first(family: str) -> None:
    model = tiny_model(family)
    layers = moe_layers(model)
    with torch.no_grad():
        for layer, scale in zip(layers, (0.3, 0.01, 0.1, 1.0), strict=False):
            layer.experts.down_proj *= scale
            if layer.shared is not None:
                layer.shared.down_proj.weight *= scale
    statistics = collect_statistics(model, [tiny_batch()])
    indices = [layer.info.index for layer in layers]
    made = DropLayers(num_layers=2).plan(Profile(statistics))
    assert made.layer_order == (indices[1], indices[2])
    assert {edit.index for edit in made.edited()} == {indices[1], indices[2]}
    assert {edit.edit for edit in made.edited()} == {"drop_layer"}
    for edit, one in zip(made.edits, statistics, strict=True):
        assert edit.scores == (one.mean_cosine("layer"),)
    blocks = DropBlocks(num_layers=2).plan(Profile(statistics))
    similarity = {one.info.index: one.mean_cosine("block") for one in statistics}
    assert blocks.layer_order == tuple(sorted(similarity, key=lambda i: -similarity[i])[:2])
    assert {edit.edit for edit in blocks.edited()} == {"drop_block"}
    assert {edit.scores[0] for edit in blocks.edits} == set(similarity.values())


def test_named_layers_and_the_plan_on_disk(tmp_path: Path) -> None:
    statistics = collect_statistics(tiny_model("mixtral"), [tiny_batch()])
    for method in (DropLayers(1, layers=[3, 0], padding=0.5), DropBlocks(1, layers=[3, 0])):
        made = method.plan(Profile(statistics))
        assert made.layer_order == (3, 0)
        assert [edit.index for edit in made.edited()] == [0, 3]
        (tmp_path / "plan.json").write_text(made.to_text())
        assert Plan.load(tmp_path / "plan.json") == made


def test_impossible_requests_are_refused_before_any_work() -> None:
    for method in (DropLayers, DropBlocks):
        for number in (0, 4):
            with pytest.raises(UserError, match=rf"num_layers={number}: the model has 3 MoE"):
                method(number).check(INFOS)
        with pytest.raises(UserError, match=r"names \[0, 9\].*MoE layers are \[1, 2, 3\]"):
            method(1, layers=[0, 1, 9]).check(INFOS)
        with pytest.raises(UserError, match="each once"):
            method(1, layers=[1, 1]).check(INFOS)
        with pytest.raises(UserError, match=r"does not exist.*cosine"):
            method(1, layers="greedy").check(INFOS)
        method(3).check(INFOS)
    everything = [LayerInfo(i, "x", 8, 2, 32, num_decoders=3) for i in range(3)]
    DropLayers(3).check(everything)
    with pytest.raises(UserError, match="all 3 decoder layers"):
        DropBlocks(3).check(everything)
    with pytest.raises(UserError, match="padding=2"):
        DropLayers(1, padding=2).check(INFOS)


def test_what_was_dropped_is_compressed_again(tmp_path: Path) -> None:
    """Our own form is cut along with the config when blocks of such a model are dropped."""
    assert not edited("mixtral", [drop("drop_layer", 2)], tmp_path / "first")
    model = load(tmp_path / "first" / "model")
    assert [layer.info.index for layer in moe_layers(model)] == [0, 1, 3]
    apply_plan(model, Plan((Edit(1, "model.layers.1.mlp", "drop_block"),)))
    expected = logits_of(model)
    assert not save_checkpoint(model, tmp_path / "second", tmp_path / "first" / "model").stock
    again = load(tmp_path / "second")
    assert [layer.info.index for layer in moe_layers(again)] == [0, 2]
    assert torch.equal(logits_of(again), expected)


def test_a_pattern_of_dense_layers_becomes_a_list(tmp_path: Path) -> None:
    edits = [drop("drop_block", 1)]
    assert edited("qwen3_moe", edits, tmp_path / "x", decoder_sparse_step=2)
    config = json.loads((tmp_path / "x" / "model" / "config.json").read_text())
    assert (config["mlp_only_layers"], config["decoder_sparse_step"]) == ([0, 1], 1)
    assert in_fresh_process("stock", [tmp_path / "x"]) == {"x": 0.0}


def test_a_family_that_cannot_say_it_is_refused_and_left_as_it_was() -> None:
    config = AutoConfig.for_model(
        "ernie4_5_moe", vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, moe_intermediate_size=16, moe_k=2,
        moe_num_experts=8, moe_num_shared_experts=1, moe_layer_start_index=0, moe_layer_end_index=3,
        moe_layer_interval=2, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    before = logits_of(model)
    first = moe_layers(model)[0].info
    with pytest.raises(UserError, match=r"cannot say which.*method=drop_layers"):
        apply_plan(model, Plan((Edit(first.index, first.name, "drop_block"),)))
    assert model.config.num_hidden_layers == 4
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("method", ["drop_layers", "drop_blocks"])
def test_a_whole_run(method: str, job: Callable[..., Outcome]) -> None:
    done = job(f"method={method}", "condense.num_layers=2")
    assert done.code == 0, done.text
    report = done.report
    assert (report["method"], report["status"]) == (method, "ok")
    assert (report["condense/num_layers"], report[f"{method}/layers"]) == (2, "cosine")
    model = load(report["compressed/checkpoint"])
    assert report["compressed/stock"] == (method == "drop_blocks")
    assert len(model.model.layers) == (2 if method == "drop_blocks" else 4)
    assert len(moe_layers(model)) == 1
    order = json.loads(report["plan/layers"])
    assert len(order) == 2
    assert set(order) <= {1, 2, 3}
    refused = job(f"method={method}", "condense.num_layers=9")
    assert refused.code == 2
    assert "num_layers=9: the model has 3 MoE layers" in refused.text
