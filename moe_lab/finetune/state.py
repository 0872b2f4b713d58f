"""The state of a training on disk, which proves itself: a restart from another one is none."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_lab.integrity import PARTIAL, SUM, flush


def write_state(tensors: dict[str, Tensor], path: Path) -> None:
    """Put tensors into a file that is there in full or not at all, with a sum over all of them."""
    whole = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    partial = path.with_name(f"{path.name}{PARTIAL}")
    save_file(whole, partial, {SUM: sum_of(whole)})
    flush(partial)
    partial.replace(path)


def read_state(path: Path) -> dict[str, Tensor]:
    """What `write_state` wrote; ValueError where the file is torn, or is not what was written."""
    try:
        with safe_open(path, "pt") as file:
            told = (file.metadata() or {}).get(SUM)
            tensors = {name: file.get_tensor(name) for name in file.offset_keys()}
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    if told != sum_of(tensors):
        raise ValueError("it has changed since it was written (another sha256)")
    return tensors


def sum_of(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 over names, shapes and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
