"""Packed weights: every bit where the format has it, by a slow reader, and what is not packed."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from edited_models import edited, prune
from families import tiny_model
from in_few_bits import quantised
from safetensors.torch import load_file
from torch import Tensor

from moe_lab.export.compressed_tensors import export
from moe_lab.export.folder import stored_tensors
from moe_lab.export.given import Given
from moe_lab.models.checkpoint import Checkpoint, load
from moe_lab.models.matrices import WeightMatrix, matrices_of
from moe_lab.models.rounding import Scheme
from moe_lab.quantize.base import QuantizeJob, Quantizing
from moe_lab.quantize.rounded_each import RoundedEach
from moe_lab.quantize.rtn import RoundToNearest
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
        ({"bits": 1}, "--bits 1: it packs 2 to 8"),
        ({"group_size": "96"}, "--group-size 96: there are 128, 64, 32, channel"),
    ):
        with pytest.raises(UserError, match=message):
            export(given(shipped), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_what_it_cannot_pack_is_refused(tmp_path: Path) -> None:
    assert not edited("mixtral", [prune(1, [0, 1])], tmp_path / "own")
    with pytest.raises(UserError, match=r"structures that their family's own form has not"):
        export(given(tmp_path / "own" / "model"), tmp_path / "out", group_size="channel")
    tiny_model("gpt_oss").save_pretrained(tmp_path / "fused")
    with pytest.raises(UserError, match="several experts in one tensor"):
        export(given(tmp_path / "fused"), tmp_path / "out", group_size="channel")
    tiny_model("mixtral").save_pretrained(tmp_path / "dense")
    export(given(tmp_path / "dense"), tmp_path / "out", group_size="channel")
    with pytest.raises(UserError, match=r"stored in 4 bits \(compressed-tensors\) already"):
        export(given(tmp_path / "out"), tmp_path / "again", group_size="channel")


@dataclass(frozen=True)
class ByLayer(RoundToNearest):
    """Bits that differ between layers, or where asked between experts, too."""

    by_expert: bool = False

    @property
    def scheme(self) -> None:  # type: ignore[override]
        return None

    def begin(self, job: QuantizeJob) -> Quantizing:
        def bits(one: WeightMatrix) -> int:
            return 3 + (one.layer + (one.expert or 0) * self.by_expert) % 2

        schemes = {one.key: Scheme(bits(one), 8, self.symmetric) for one in job.chosen}
        return RoundedEach(schemes)


def test_bits_that_differ_by_layer_are_told_as_vllm_reads_them(tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path / "dense")
    folder = tmp_path / "few" / "checkpoint"
    form, _ = quantised(tmp_path / "dense", ByLayer(symmetric=False), folder)
    assert not form.stock
    told = export(given(folder), tmp_path / "out")
    assert "192 packed matrices, 2 schemes" not in told[0] and "96 packed matrices" in told[0]
    assert "for vLLM alone" in told[1]
    values = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    groups = values["config_groups"].values()
    assert {group["weights"]["num_bits"] for group in groups} == {3, 4}
    before, after = load_file(folder / "model.safetensors"), stored_tensors(tmp_path / "out")
    assert {key for key in before if not key.endswith("_scheme")} == set(after)
    for number, group in enumerate(groups):
        (first, *_) = group["targets"]
        layer = f"model.layers.{number}.block_sparse_moe.experts.5.w1"
        assert re.match(first.removeprefix("re:"), layer)
        scheme = QuantizationScheme(
            targets=["Linear"], weights=QuantizationArgs(**group["weights"])
        )
        parts = {
            f"weight_{name}": after[f"{layer}.weight_{name}"].load()
            for name in ("packed", "scale", "shape", "zero_point")
        }
        read = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
        matrix = next(
            one for one in matrices_of(Checkpoint(folder)).every if one.key == f"{layer}.weight"
        )
        assert torch.equal(read, matrix.load())
    with pytest.raises(UserError, match=r"2 groups of weights .*, and one is read"):
        load(tmp_path / "out")


def test_bits_that_differ_between_the_experts_of_a_layer_are_refused(tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path / "dense")
    folder = tmp_path / "few" / "checkpoint"
    quantised(tmp_path / "dense", ByLayer(by_expert=True), folder)
    with pytest.raises(UserError, match="the experts of layer 0 have different schemes"):
        export(given(folder), tmp_path / "out")
    with pytest.raises(UserError, match="packed already, and its levels stay"):
        export(given(folder), tmp_path / "out", bits=4)


def test_pruned_checkpoints_are_packed(tmp_path: Path) -> None:
    assert edited("qwen3_moe", [prune(i, [0, 3, 5]) for i in range(4)], tmp_path / "one")
    folder = tmp_path / "one" / "model"
    export(given(folder), tmp_path / "out", bits=4, group_size="channel")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert "model.layers.2.mlp.experts.2.up_proj.weight_packed" in tensors
    assert "model.layers.2.mlp.experts.3.up_proj.weight_packed" not in tensors
    assert Checkpoint(folder).layers()[0].num_experts == 3
