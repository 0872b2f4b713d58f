"""Checkpoints: found, sized, loaded, compressed again, refused when broken."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from edited_models import condense, edited, prune, saved_bytes
from families import tiny_batch, tiny_model
from safetensors.torch import load_file, save_file

from moe_lab.models import saving
from moe_lab.models.checkpoint import Checkpoint, load, resolve
from moe_lab.models.edits.plan import Plan, apply_plan
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.models.layers import moe_layers
from moe_lab.models.saving import save_checkpoint
from moe_lab.types import UserError


def test_a_compressed_model_is_compressed_again(tmp_path: Path) -> None:
    edited("qwen2_moe", [condense(2, [1, 2]), prune(1, [0, 1, 2, 3])], tmp_path / "first")
    source = tmp_path / "first" / "model"
    model, batch = load(source), tiny_batch()
    assert [layer.info.num_experts for layer in moe_layers(model)] == [4, 8]
    apply_plan(model, Plan((PruneExperts(3, "model.layers.3.mlp", kept=(7, 6, 5, 4)),)))
    with torch.no_grad():
        logits = model(**batch).logits
    assert save_checkpoint(
        model, tmp_path / "second", source
    ).stock  # uniform again: stock once more
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "second")(**batch).logits, logits)


def test_generating_with_the_cache_equals_without(tmp_path: Path) -> None:
    edited("qwen2_moe", [condense(1, [5, 2]), condense(3, [])], tmp_path / "x")
    model = load(tmp_path / "x" / "model")
    prompt = tiny_batch(padding=False, batch=1)
    outputs = [
        model.generate(**prompt, max_new_tokens=8, do_sample=False, use_cache=cache)
        for cache in (True, False)
    ]
    assert torch.equal(*outputs)


def test_broken_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a folder here nor a hub id"):
        resolve(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"config.json is missing"):
        resolve(tmp_path / "empty")
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    shards = sorted((tmp_path / "sharded").glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    with pytest.raises(UserError, match=f"lacks 1 of {len(shards)} weight files"):
        resolve(tmp_path / "sharded")
    model.save_pretrained(tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "weights.bin")
    with pytest.raises(UserError, match=r"weights.bin. moe_lab reads safetensors only"):
        resolve(tmp_path / "pickled")


def test_missing_tensors_are_refused(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path / "x")
    file = tmp_path / "x" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 tensors"):
        load(tmp_path / "x")


def test_a_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    assert resolve(tmp_path / "a").fingerprint == resolve(tmp_path / "b").fingerprint
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    model.save_pretrained(tmp_path / "c")
    assert resolve(tmp_path / "c").fingerprint != resolve(tmp_path / "a").fingerprint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "gpt_oss"])
@pytest.mark.filterwarnings("ignore")
def test_sizes_are_those_of_the_model_that_is_saved(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    tied = {"tie_word_embeddings": family == "qwen2_moe"}
    model = tiny_model(family, **tied)
    first, source = tmp_path / "first", tmp_path / "model"
    saving.save_checkpoint(model, first, _stored(model, tmp_path, dtype))
    saving.save_checkpoint(Checkpoint(first).load(), source, first)
    headers = saved_bytes(source)[1] - saved_bytes(source)[0]
    for computing in ("auto", "float32"):
        dense = Checkpoint(source, computing)
        infos, loaded = dense.layers(), dense.load()
        saving.save_checkpoint(loaded, tmp_path / f"again_{computing}", source)
        intact = saved_bytes(tmp_path / f"again_{computing}")[0]
        assert infos[0].model_bytes == intact + headers
        loaded = dense.load()
        parameters = {id(p): p.numel() for p in loaded.parameters()}
        assert infos[0].model_parameters == sum(parameters.values())
        kept = {info.index: 8 - 2 * (place + 1) if family != "deepseek_v3" else 4
                for place, info in enumerate(infos[:2])}  # fmt: skip
        gone = [(info, 8 - kept[info.index]) for info in infos[:2]]
        edits = (PruneExperts(info.index, info.name, kept=tuple(range(8))[: kept[info.index]])
                 for info in infos[:2])  # fmt: skip
        apply_plan(loaded, Plan(tuple(edits)))
        after = {id(p): p.numel() for p in loaded.parameters()}
        removed = sum(number * info.expert_parameters for info, number in gone)
        assert sum(after.values()) == infos[0].model_parameters - removed
        saving.save_checkpoint(loaded, tmp_path / computing, source)
        removed = sum(number * info.expert_bytes for info, number in gone)
        assert saved_bytes(tmp_path / computing)[0] == intact - removed
        assert saved_bytes(tmp_path / computing)[1] <= infos[0].model_bytes - removed


def _stored(model: Any, folder: Path, dtype: torch.dtype) -> Path:
    """A checkpoint of the model in this dtype."""
    copy.deepcopy(model).to(dtype).save_pretrained(folder / "stored")
    return folder / "stored"


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "gpt_oss"])
def test_what_goes_straight_to_a_device_is_the_same_model(family: str, tmp_path: Path) -> None:
    """By a name of the processor that is taken for another device's."""
    tiny_model(family).save_pretrained(tmp_path)
    here, there = load(tmp_path), load(tmp_path, device="cpu:0")
    expected, found = here.state_dict(), there.state_dict()
    assert expected.keys() == found.keys() and not there.training
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    batch = tiny_batch()
    with torch.no_grad():
        assert torch.equal(here(**batch).logits, there(**batch).logits)
