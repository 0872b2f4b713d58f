"""Checkpoints with a few numbers that are none, or too large for half precision."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

LAYER = "model.layers.2.mlp"
# Where one number is written, by what it is a part of; in layer 2 of three MoE layers, expert 3.
PLACES: dict[str, tuple[str, tuple[int, ...]]] = {
    "down": (f"{LAYER}.experts.3.down_proj.weight", (5, 7)),
    "gate": (f"{LAYER}.experts.3.gate_proj.weight", (1, 2)),
    "up": (f"{LAYER}.experts.3.up_proj.weight", (0, 0)),
    "router": (f"{LAYER}.gate.weight", (3, 4)),
    "shared": (f"{LAYER}.shared_expert.down_proj.weight", (2, 2)),
    "shared gate": (f"{LAYER}.shared_expert_gate.weight", (0, 1)),
    "norm": ("model.layers.2.post_attention_layernorm.weight", (6,)),
    "attention": ("model.layers.2.self_attn.o_proj.weight", (1, 1)),
    "embedding": ("model.embed_tokens.weight", (71, 3)),  # the letter e
    "dense": ("model.layers.0.mlp.down_proj.weight", (1, 1)),
    "final norm": ("model.norm.weight", (4,)),
    "head": ("lm_head.weight", (9, 9)),
}


def broken(source: Path, folder: Path, values: Mapping[str, float]) -> Path:
    """A copy of a checkpoint of one file with numbers put into PLACES, by their names."""

    def put(tensor: torch.Tensor, index: tuple[int, ...], value: float) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return _changed(source, folder, values, put)


def scaled(source: Path, folder: Path, factors: Mapping[str, float]) -> Path:
    """A copy whose tensors of PLACES are multiplied as a whole."""
    return _changed(
        source, folder, factors,
        lambda tensor, _, factor: (tensor.double() * factor).to(torch.float32),
    )  # fmt: skip


def _changed(
    source: Path, folder: Path, numbers: Mapping[str, float], change: Callable[..., torch.Tensor]
) -> Path:
    shutil.copytree(source, folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for place, number in numbers.items():
        name, index = PLACES[place]
        tensors[name] = change(tensors[name], index, number)
    save_file(tensors, path, {"format": "pt"})
    return folder
