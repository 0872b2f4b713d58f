"""Decoder layers that are dropped: what is computed then, and what the config says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from edited_models import applied, drop, edited, in_fresh_process
from families import EACH_FAMILY, FAMILIES, logits_of, tiny_batch, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from moe_lab.families import tiny as families
from moe_lab.models.checkpoint import load
from moe_lab.models.depth import cut_config, drop_decoders
from moe_lab.models.edits.drop_block import DropBlock
from moe_lab.models.edits.plan import Plan, apply_plan
from moe_lab.models.layers import moe_layers
from moe_lab.types import UserError


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
        apply_plan(model, Plan((DropBlock(first.index, first.name),)))
    assert model.config.num_hidden_layers == 4
    assert torch.equal(logits_of(model), before)


def test_leading_dense_layers_are_counted_again() -> None:
    for kept, leading in (((0, 1, 3), 2), ((0, 2, 3), 1), ((2, 3), 0)):
        config = PreTrainedConfig(num_hidden_layers=4, first_k_dense_replace=2)
        cut_config(config, kept)
        assert (config.num_hidden_layers, config.first_k_dense_replace) == (len(kept), leading)


def test_a_config_that_cannot_be_cut_is_refused_in_words() -> None:
    model = families.tiny_model("gemma4_text")
    with pytest.raises(UserError, match=r"cannot describe|would be another layer"):
        drop_decoders(model, "model.layers", [1])
