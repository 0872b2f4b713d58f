"""Layers replayed one by one are the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import tiny_batch, tiny_model

from moe_lab.models.activations import Activations
from moe_lab.models.checkpoint import Checkpoint, load
from moe_lab.models.layerwise import LayerwiseModel
from moe_lab.models.stream import LayerStream
from moe_lab.profile.collect import collect_statistics, collecting


def test_replaying_layer_by_layer_is_the_model() -> None:
    for family in ("qwen2_moe", "gpt_oss", "deepseek_v3", "olmoe"):
        model, batches = tiny_model(family), [tiny_batch(length=20)]
        stream = LayerStream(model, batches)
        with torch.no_grad():
            hidden = stream.cache["input", 0]
            for index in range(4):
                hidden = stream.replay(index, 0, hidden)
            expected = model.model(**batches[0]).last_hidden_state
            assert torch.equal(stream.finish(hidden), expected), family


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


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "deepseek_v3"])
def test_masks_that_are_not_kept_are_made_again(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = tiny_model(family), [tiny_batch(seed, length=20) for seed in range(3)]
    monkeypatch.setattr("moe_lab.models.stream.ARGUMENT_BYTES", 0)
    stream = LayerStream(model, batches)
    assert not stream._arguments
    last = []
    with collecting(model) as collection:
        for number in range(3):
            hidden = stream.cache["input", number]
            for index in range(4):
                with collection.batch(stream.valid[number]):
                    hidden = stream.replay(index, number, hidden)
            last.append(stream.finish(hidden))
    for hidden, batch in zip(last, batches, strict=True):
        torch.testing.assert_close(hidden, model.model(**batch).last_hidden_state)
    whole = collect_statistics(model, batches)
    for one, other in zip(collection.of_group(), whole, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one.sums)
