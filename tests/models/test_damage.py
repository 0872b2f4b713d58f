"""Why a model gives numbers that are none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import tiny_model
from safetensors.torch import load_file, save_file

from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.damage import explained


def written(folder: Path, family: str, values: dict[str, float], dtype: str) -> Checkpoint:
    """A tiny model with numbers put at [1, 2] or [1] of some tensors."""
    tiny_model(family).save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, value in values.items():
        tensors[name][(1, 2)[: tensors[name].dim()]] = value
    save_file(tensors, path, {"format": "pt"})
    return Checkpoint(folder, dtype)


NAN = float("nan")


@pytest.mark.parametrize(
    ("family", "values", "dtype", "words"),
    [
        ("qwen2_moe", {"model.norm.weight": NAN}, "float32",
         "model.norm.weight in model.safetensors holds NaN at [1]: it is damaged"),
        ("gpt_oss", {"model.layers.2.mlp.experts.down_proj": float("inf")}, "float32",
         "experts.down_proj in model.safetensors holds infinite at [1, 2, 0] (expert 1)"),
        ("qwen2_moe", {"lm_head.weight": -7e4}, "float16",
         "lm_head.weight in model.safetensors holds -70000 at [1, 2], and float16 ends at 65504: "
         "try model.dtype=bfloat16"),
        ("qwen2_moe", {}, "float16",
         "are finite, so that what the model computes is too large for float16, which ends at "
         "65504: try model.dtype=bfloat16, or float32"),
        ("qwen2_moe", {}, "bfloat16", "too large for bfloat16: try model.dtype=float32"),
        ("qwen2_moe", {}, "auto", "too large for float32: try model.dtype=float64"),
    ],
)  # fmt: skip
def test_the_reason_is_told(
    family: str, values: dict[str, float], dtype: str, words: str, tmp_path: Path
) -> None:
    assert words in explained({"dense": written(tmp_path / "dense", family, values, dtype)})


def test_the_first_of_several_in_the_order_of_layers_and_of_checkpoints(tmp_path: Path) -> None:
    names = [f"model.layers.{index}.mlp.gate.weight" for index in (3, 1, 2)]
    bad = written(tmp_path / "bad", "qwen2_moe", dict.fromkeys(names, NAN), "float32")
    good = written(tmp_path / "good", "qwen2_moe", {}, "float32")
    told = explained({"dense": good, "compressed": bad})
    assert f"The compressed checkpoint at {bad.path}: model.layers.1.mlp.gate.weight" in told
    late = written(tmp_path / "late", "qwen2_moe", {names[0]: NAN}, "float32")
    assert "layers.3.mlp.gate" in explained({"dense": late}, layer=3)
    assert "All weights looked at are finite" in explained({"dense": late}, layer=2)


def test_float8_is_read_too(tmp_path: Path) -> None:
    checkpoint = written(tmp_path / "dense", "qwen2_moe", {}, "float32")
    path = checkpoint.path / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.experts.4.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors["some.indices"] = torch.arange(3)
    save_file(tensors, path, {"format": "pt"})
    assert "All weights looked at are finite" in explained({"dense": checkpoint})
    tensors[name].view(torch.uint8)[2, 3] = 0x7F
    save_file(tensors, path, {"format": "pt"})
    assert f"{name} in model.safetensors holds NaN at [2, 3]" in explained({"dense": checkpoint})
