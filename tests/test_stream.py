"""Decoder layers from disk, and activations that go there: the same numbers, less memory."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from families import FAMILIES, tiny_batch, tiny_model
from safetensors.torch import load_file, save_file

from moe_lab.models.activations import Activations
from moe_lab.models.checkpoint import Checkpoint, load
from moe_lab.models.editing import apply_plan
from moe_lab.models.layers import moe_layers
from moe_lab.models.layerwise import LayerwiseModel
from moe_lab.models.saving import save_checkpoint
from moe_lab.models.stream import LayerStream
from moe_lab.types import Edit, Plan, UserError


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
        assert torch.equal(source.model(**tiny_batch()).logits, expected.logits)
    assert all(is_empty(layer) for layer in source.layers)


def test_a_checkpoint_in_our_own_form_comes_from_disk_too(tmp_path: Path) -> None:
    tiny_model("qwen2_moe").save_pretrained(tmp_path / "source")
    model = load(tmp_path / "source")
    layer = moe_layers(model)[1]
    edit = Edit(layer.info.index, layer.info.name, "condense", experts=(4,), gates=(0.3,))
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


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "deepseek_v3"])
def test_a_stream_from_disk_is_the_model(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    batch = tiny_batch(length=20)
    source = LayerwiseModel(Checkpoint(tmp_path))
    stream = LayerStream(source, [batch], Activations(limit=0, folder=tmp_path))
    with torch.no_grad():
        hidden = stream.cache["input", 0]
        for index in range(4):
            with stream.layer(index):
                hidden = stream.replay(index, 0, hidden)
        expected = load(tmp_path).model(**batch).last_hidden_state
    assert torch.equal(stream.finish(hidden), expected)


def test_activations_keep_to_their_limit(tmp_path: Path) -> None:
    one = torch.arange(10.0)
    cache = Activations(limit=2 * one.nbytes, folder=tmp_path)
    for number in range(5):
        cache["state", number] = one + number
    assert cache.held == 2 * one.nbytes
    assert cache.spilled == 3 * one.nbytes
    assert all(torch.equal(cache["state", number], one + number) for number in range(5))
    assert len(list(tmp_path.glob("activations_*/*"))) == 3
    cache["state", 4] = one.bfloat16()
    assert cache["state", 4].dtype == torch.bfloat16
    for number in range(5):
        cache.pop(("state", number))
    assert cache.held == 0
    assert not list(tmp_path.glob("activations_*/*"))
    with pytest.raises(KeyError):
        cache["state", 0]


def test_what_is_needed_is_said_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = Activations(limit=2**30, folder=tmp_path)
    with caplog.at_level("INFO"):
        cache.announce({"states": 3 * 2**30})
    assert "states up to 3.00 GiB; 2.00 GiB of it in files under" in caplog.text
    with pytest.raises(UserError, match=r"are free: ask for fewer"):
        cache.announce({"states": 2**60})
