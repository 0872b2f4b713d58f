"""Packed weights: every bit where the format has it, by a slow reader, and what is not packed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from edited_models import edited, prune
from families import tiny_model
from safetensors.torch import load_file
from torch import Tensor

from moe_lab.export.compressed_tensors import dequantised, export, pack, rounded, unpack
from moe_lab.export.folder import stored_tensors
from moe_lab.export.given import Given
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.types import UserError


def given(folder: Path) -> Given:
    return Given(str(folder), checkpoint_folder=folder)


def slowly_read(words: Tensor, scale: Tensor, bits: int, shape: list[int]) -> Tensor:
    """Bit by bit: a row is a stream, of which element i has bits i*b to (i+1)*b, low ones first."""
    read = torch.empty(shape)
    group = shape[1] // scale.shape[1]
    for row in range(shape[0]):
        stream = 0
        for place, word in enumerate(words[row].tolist()):
            stream |= (word & 0xFFFFFFFF) << (32 * place)
        for column in range(shape[1]):
            level = (stream >> (bits * column)) & (2**bits - 1)
            read[row, column] = (level - 2 ** (bits - 1)) * float(scale[row, column // group])
    return read


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [8, None])
def test_rounding_to_nearest_and_every_bit_in_its_place(bits: int, size: int | None) -> None:
    weight = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    weight[1, 8:16] = 0.0
    levels, scale = rounded(weight, bits, size)
    words = pack(levels, bits)
    assert words.dtype == torch.int32 and words.shape == (3, math.ceil(40 * bits / 32))
    assert scale.shape == (3, 40 // size if size else 1)
    assert torch.equal(unpack(words, bits, (3, 40)), levels)
    assert levels.min() >= -(2 ** (bits - 1)) and levels.max() <= 2 ** (bits - 1) - 1
    read = slowly_read(words, scale, bits, [3, 40])
    step = scale.repeat_interleave(size or 40, dim=1)
    assert ((read - weight).abs() <= 0.501 * step).all(), "the nearest level"
    largest = weight.unflatten(1, (-1, size or 40)).abs().amax(dim=-1)
    expected = torch.where(largest > 0, largest / ((2**bits - 1) / 2), 1.0)
    assert torch.allclose(scale, expected)
    parts = {"w_packed": words, "w_scale": scale, "w_shape": torch.tensor([3, 40])}
    assert torch.allclose(dequantised(parts, "w", bits), read, atol=1e-6)


def test_a_packed_row_may_end_within_a_word() -> None:
    levels = torch.tensor([[-8, 7, 0, -1, 5]], dtype=torch.int8)
    words = pack(levels, 4)
    assert words.tolist() == [[0xD78F0 | 0]], "0, 15, 8, 7, 13, low bits first"
    assert torch.equal(unpack(words, 4, (1, 5)), levels)


@pytest.mark.parametrize(("family", "dtype"), [
    ("mixtral", torch.bfloat16), ("qwen2_moe", torch.float32), ("deepseek_v3", torch.float32),
])  # fmt: skip
def test_experts_and_linear_layers_are_packed_and_nothing_else(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    tiny_model(family).to(dtype).save_pretrained(tmp_path / "dense", max_shard_size="40KB")
    (told,) = export(given(tmp_path / "dense"), tmp_path / "out", bits=8, group_size="channel")
    assert "matrices are packed in 8 bits, rounded to nearest without calibration" in told
    before, after = ({key: one.load() for key, one in stored_tensors(tmp_path / name).items()}
                     for name in ("dense", "out"))  # fmt: skip
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    kept = set()
    for key, weight in before.items():
        if key in after:
            assert torch.equal(after.pop(key), weight)
            kept.add(key)
            continue
        words, scale, shape = (after.pop(f"{key}_{part}") for part in ("packed", "scale", "shape"))
        assert shape.tolist() == list(weight.shape) and scale.dtype == dtype
        read = slowly_read(words[:2], scale[:2], 8, [2, weight.shape[1]])
        assert torch.allclose(read, weight[:2].float(), atol=float(scale.max()))
    assert not after
    matrices = {key for key in kept if before[key].dim() == 2}
    stay = ("embed_tokens", "lm_head", ".gate.weight", "shared_expert_gate")
    assert matrices and all(any(one in key for one in stay) for key in matrices)
    ignored = {f"{path}.weight" for path in config["ignore"]}
    assert matrices - ignored == {"model.embed_tokens.weight"}
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "pack-quantized")
    (group,) = config["config_groups"].values()
    assert group["targets"] == ["Linear"] and group["weights"]["strategy"] == "channel"


def test_widths_that_groups_do_not_divide_are_told_with_what_fits(
    shipped: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"size 128 does not divide the 160 .*: 32, channel"):
        export(given(shipped), tmp_path / "out")
    for options, message in (
        ({"bits": 3}, "--bits 3: it packs 4 or 8"),
        ({"group_size": "96"}, "--group-size 96: there are 128, 64, 32, channel"),
    ):
        with pytest.raises(UserError, match=message):
            export(given(shipped), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_what_it_cannot_pack_is_refused(tmp_path: Path) -> None:
    assert not edited("mixtral", [prune(1, [0, 1])], tmp_path / "own")
    with pytest.raises(UserError, match=r"own form, .* it takes families' own forms"):
        export(given(tmp_path / "own" / "model"), tmp_path / "out", group_size="channel")
    tiny_model("gpt_oss").save_pretrained(tmp_path / "fused")
    with pytest.raises(UserError, match="all experts in one tensor"):
        export(given(tmp_path / "fused"), tmp_path / "out", group_size="channel")
    tiny_model("mixtral").save_pretrained(tmp_path / "dense")
    export(given(tmp_path / "dense"), tmp_path / "out", group_size="channel")
    with pytest.raises(UserError, match="the weights are quantised"):
        export(given(tmp_path / "out"), tmp_path / "again", group_size="channel")


def test_pruned_checkpoints_are_packed(tmp_path: Path) -> None:
    assert edited("qwen3_moe", [prune(i, [0, 3, 5]) for i in range(4)], tmp_path / "one")
    folder = tmp_path / "one" / "model"
    export(given(folder), tmp_path / "out", bits=4, group_size="channel")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert "model.layers.2.mlp.experts.2.up_proj.weight_packed" in tensors
    assert "model.layers.2.mlp.experts.3.up_proj.weight_packed" not in tensors
    assert Checkpoint(folder).layers()[0].num_experts == 3
