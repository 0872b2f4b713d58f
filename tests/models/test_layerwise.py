"""Decoder layers from disk, one at a time, and routers alone."""

from __future__ import annotations

import json
import os
import threading
from contextlib import ExitStack
from pathlib import Path

import deepseek_original
import pytest
import torch
from families import FAMILIES, tiny_batch, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moe_lab.models.checkpoint import Checkpoint, load, resolve
from moe_lab.models.edits.condense import CondenseLayer
from moe_lab.models.edits.plan import Plan, apply_plan
from moe_lab.models.layers import moe_layers
from moe_lab.models.layerwise import LayerwiseModel, OverlaidModel, routers_only
from moe_lab.models.saving import save_checkpoint
from moe_lab.models.stored import stored_in
from moe_lab.types import UserError


def is_empty(layer) -> bool:
    return all(parameter.is_meta for parameter in layer.parameters())


@pytest.mark.parametrize("dtype", ["float32", "auto"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_from_disk_layer_by_layer_is_the_model(
    family: str, dtype: str, tmp_path: Path
) -> None:
    tiny_model(family).to(torch.bfloat16).save_pretrained(tmp_path)
    source = LayerwiseModel(Checkpoint(tmp_path, dtype))
    assert all(is_empty(layer) for layer in source.layers)
    for index in (0, 2):  # used and emptied before: what follows fills them again
        with source.layer(index) as layer:
            assert not any(parameter.is_meta for parameter in layer.parameters())
    with ExitStack() as stack, torch.no_grad():
        for index in range(len(source.layers)):
            stack.enter_context(source.layer(index))
        expected = load(tmp_path, dtype=dtype)(**tiny_batch())
        logits = source.model(**tiny_batch()).logits
        torch.testing.assert_close(logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert all(is_empty(layer) for layer in source.layers)


def test_a_checkpoint_in_our_own_form_comes_from_disk_too(tmp_path: Path) -> None:
    tiny_model("qwen2_moe").save_pretrained(tmp_path / "source")
    model = load(tmp_path / "source")
    layer = moe_layers(model)[1]
    edit = CondenseLayer(layer.info.index, layer.info.name, experts=(4,), gates=(0.3,))
    apply_plan(model, Plan((edit,)))
    assert not save_checkpoint(model, tmp_path / "condensed", tmp_path / "source", padding=0).stock
    source = LayerwiseModel(Checkpoint(tmp_path / "condensed"))
    with ExitStack() as stack, torch.no_grad():
        for index in range(len(source.layers)):
            stack.enter_context(source.layer(index))
        assert torch.equal(source.model(**tiny_batch()).logits, model(**tiny_batch()).logits)


def test_layers_stay_while_there_is_room(tmp_path: Path) -> None:
    tiny_model("qwen2_moe").save_pretrained(tmp_path)
    one = LayerwiseModel(Checkpoint(tmp_path)).layer_bytes()
    source = LayerwiseModel(Checkpoint(tmp_path), keep_bytes=2 * one)
    for _ in range(2):
        for index in (1, 2, 3):
            with source.layer(index):
                pass
    assert [is_empty(source.layers[index]) for index in (1, 2, 3)] == [False, False, True]


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    tiny_model("qwen2_moe").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.2.self_attn.q_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    source = LayerwiseModel(Checkpoint(tmp_path))
    with pytest.raises(UserError, match=r"layer 2.*q_proj"), source.layer(2):
        pass
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.norm\.weight"):
        LayerwiseModel(Checkpoint(tmp_path))


def test_only_routers_are_read(tmp_path: Path) -> None:
    """Other tensors may be missing on disk, and stay without weights."""
    tiny_model("mixtral").save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    used = {file for key, file in values["weight_map"].items() if "gate.weight" in key}
    assert used < set(values["weight_map"].values())
    values["weight_map"] = {key: f for key, f in values["weight_map"].items() if f in used}
    index.write_text(json.dumps(values))
    model = routers_only(Checkpoint(tmp_path))
    filled = [name for name, parameter in model.named_parameters() if not parameter.is_meta]
    assert filled == [f"model.layers.{layer}.mlp.gate.weight" for layer in range(4)]


def test_a_router_that_is_missing_is_told(tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {
        k: v for k, v in load_file(file).items() if "layers.2.block_sparse_moe.gate" not in k
    }
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 tensors, such as model\.layers\.2\.mlp\.gate"):
        routers_only(Checkpoint(tmp_path))


def test_a_reference_in_its_original_layout_needs_no_conversion(tmp_path: Path) -> None:
    folder = deepseek_original.make(tmp_path / "original")
    layers = moe_layers(routers_only(resolve(folder)))
    assert layers
    on_disk = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            on_disk |= {key: opened.get_tensor(key) for key in opened.offset_keys()}
    for layer in layers:
        assert torch.equal(layer.router.weight, on_disk[f"{layer.info.name}.gate.weight"])


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_a_layer_that_is_read_ahead_is_the_same(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    plain, ahead = (LayerwiseModel(Checkpoint(tmp_path)) for _ in range(2))
    ahead.fills_ahead = True  # as onto a GPU
    filled: list[tuple[int | None, bool]] = []
    fill = LayerwiseModel._fill

    def noted(self: LayerwiseModel, part: int | None, *without: list[str]) -> None:
        filled.append((part, threading.current_thread() is threading.main_thread()))
        fill(self, part, *without)

    monkeypatch.setattr(LayerwiseModel, "_fill", noted)
    for index in range(4):
        with plain.layer(index) as one, ahead.layer(index, index + 1 if index < 3 else None) as two:
            values = zip(one.state_dict().items(), two.state_dict().items(), strict=True)
            assert all(name == same and torch.equal(a, b) for (name, a), (same, b) in values)
            assert not any(p.requires_grad for p in two.parameters())
        in_memory = [place for place in range(4) if not is_empty(ahead.layers[place])]
        assert in_memory == ([index + 1] if index < 3 else []), "this one and the next at most"
    assert [part for part, _ in filled].count(0) == 2
    assert sorted(part for part, is_main in filled if not is_main) == [1, 2, 3]


def test_for_the_cpu_only_the_pages_of_the_next_layer_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("qwen2_moe").save_pretrained(tmp_path)
    model, asked = LayerwiseModel(Checkpoint(tmp_path)), list[tuple[int, int]]()
    monkeypatch.setattr(
        os, "posix_fadvise", lambda _, start, size, how: asked.append((start, size))
    )
    with model.layer(0, then=1):
        assert is_empty(model.layers[1])
    stored = [one for one in stored_in(tmp_path / "model.safetensors") if ".layers.1." in one.key]
    assert sorted(asked) == sorted((one.offset, one.num_bytes) for one in stored)


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_experts_in_a_wider_dtype_are_those_that_were_widened_one_by_one(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model(family).to(torch.bfloat16).save_pretrained(tmp_path)
    found = LayerwiseModel(Checkpoint(tmp_path, "float32"))
    monkeypatch.setattr("moe_lab.models.layerwise._plain_experts", lambda *_: set())
    expected = LayerwiseModel(Checkpoint(tmp_path, "float32"))
    for _ in range(2):  # also where it was filled before
        with torch.inference_mode(), found.layer(1) as one, expected.layer(1) as other:
            values = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
            for (name, a), (same, b) in values:
                assert (name, a.dtype) == (same, b.dtype) and torch.equal(a, b)
            assert not any(p.requires_grad for p in one.parameters())


def test_what_is_taken_instead_of_narrow_experts_is_not_rounded(tmp_path: Path) -> None:
    tiny_model("qwen2_moe").to(torch.bfloat16).save_pretrained(tmp_path)
    key = "model.layers.1.mlp.experts.0.down_proj.weight"
    (stored,) = (one for one in stored_in(tmp_path / "model.safetensors") if one.key == key)
    instead = torch.full(stored.shape, 1 / 3)
    model = LayerwiseModel(Checkpoint(tmp_path, "float32"), instead={key: instead})
    with model.layer(1):
        assert torch.equal(moe_layers(model.model)[0].experts.down_proj[0], instead)


def test_another_layer_than_was_read_ahead(tmp_path: Path) -> None:
    tiny_model("qwen2_moe").save_pretrained(tmp_path)
    model = LayerwiseModel(Checkpoint(tmp_path))
    model.fills_ahead = True
    with model.layer(0, then=1):
        pass
    with model.layer(2):
        assert is_empty(model.layers[1])
    assert all(map(is_empty, model.layers))


def test_nothing_is_read_ahead_where_memory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_model("qwen2_moe").save_pretrained(tmp_path)
    model = LayerwiseModel(Checkpoint(tmp_path))
    model.fills_ahead = True
    size = sum(p.nbytes for p in model.layers[1].parameters())
    for free, is_ahead in ((int(2.5 * size) - 1, False), (int(2.5 * size), True)):
        monkeypatch.setattr("moe_lab.models.layerwise.free_memory", lambda device, free=free: free)
        with caplog.at_level("INFO"), model.layer(0, then=1):
            pass
        assert is_empty(model.layers[1]) != is_ahead
    assert "decoder layers are read one after the other" in caplog.text


def test_what_goes_wrong_ahead_is_raised_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill = LayerwiseModel._fill

    def without_file(self: LayerwiseModel, *arguments: object) -> None:
        (tmp_path / "model.safetensors").unlink(missing_ok=True)
        fill(self, *arguments)

    tiny_model("qwen2_moe").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.2.mlp.experts.3.down_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = LayerwiseModel(Checkpoint(tmp_path))
    model.fills_ahead = True
    with model.layer(1, then=2):
        pass
    with pytest.raises(UserError, match="lacks tensors of layer 2"), model.layer(2):
        pass
    with model.layer(0):
        monkeypatch.setattr(LayerwiseModel, "_fill", without_file)
        model._read_ahead(1)
    with pytest.raises(FileNotFoundError), model.layer(1):
        pass


def test_what_only_went_wrong_ahead_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("qwen2_moe").save_pretrained(tmp_path)
    model, fill = LayerwiseModel(Checkpoint(tmp_path)), LayerwiseModel._fill
    model.fills_ahead = True

    def fails_ahead(self: LayerwiseModel, *arguments: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("dictionary changed size during iteration")
        fill(self, *arguments)

    monkeypatch.setattr(LayerwiseModel, "_fill", fails_ahead)
    with model.layer(0, then=1):
        pass
    with model.layer(1) as layer:
        assert not is_empty(layer)


def test_a_checkpoint_with_other_tensors_in_it(tmp_path: Path) -> None:
    """As a training leaves some: of a layer, and of what is in none; read when needed."""
    model = tiny_model("qwen3_moe")
    model.save_pretrained(tmp_path)
    asked: list[str] = []
    names = ["model.layers.1.mlp.gate.weight", "model.norm.weight"]
    others = {name: model.get_parameter(name).detach() * 2 for name in names}

    class Asked(dict):
        def __getitem__(self, name: str) -> torch.Tensor:
            asked.append(name)
            return super().__getitem__(name)

    overlaid = OverlaidModel(Checkpoint(tmp_path), Asked(others))
    assert asked == ["model.norm.weight"]
    assert torch.equal(overlaid.model.model.norm.weight, others["model.norm.weight"])
    for index, decoder in enumerate(model.model.layers):
        with overlaid.layer(index) as read:
            same = torch.equal(read.mlp.gate.weight, decoder.mlp.gate.weight)
            assert same == (index != 1)
            assert torch.equal(read.mlp.experts.down_proj, decoder.mlp.experts.down_proj)
    assert sorted(asked) == names
