"""Checkpoints of any size that take no room: config.json, and headers before holes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moe_lab.models.architecture import config_of
from moe_lab.models.checkpoint import meta_model
from moe_lab.models.headers import write_header

SHARD = 5 * 10**9  # bytes of a file, as on the hub
NAMES = {torch.bfloat16: "BF16", torch.float32: "F32"}


def write_sparse(architecture: Mapping[str, Any], folder: Path, dtype: str = "bfloat16") -> int:
    """A checkpoint of an architecture under the model's own names; the bytes that it pretends."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(architecture)
    config.dtype = dtype
    (folder / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    model, kind = meta_model(config), getattr(torch, dtype)
    shards: list[dict[str, Any]] = [{}]
    size = 0
    seen = set[int]()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        length = tensor.numel() * kind.itemsize
        if size and size + length > SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = {"dtype": NAMES[kind], "shape": list(tensor.shape),
                            "data_offsets": [size, size + length]}  # fmt: skip
        size += length
    places = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_header(folder / file, shard)
        places |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
