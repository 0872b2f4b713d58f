"""The state of a training on disk, which proves itself: a restart from another one is none.

Tensors are written and read one at a time, so that no process holds them all: safetensors' own
function to write takes all at once, and the file is in its format.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_lab import processes
from moe_lab.finetune.sharding import whole
from moe_lab.integrity import PARTIAL, SUM, flush
from moe_lab.models.edits.plan import TensorsInFile
from moe_lab.models.shards import Entry, Shard

WEIGHT = "/weight"  # ends what a state calls a trained parameter; its optimizer's values beside it
NO_SUM_YET = "0" * 64  # in the place of a sha256


def write_state(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Put tensors into a file that is there in full or not at all, with a sum over all of them.

    Every process has to call it: what is divided among them is put together, one tensor at a time,
    in the main one, which writes.
    """
    if not processes.is_main():
        for name in sorted(tensors):
            whole(tensors[name])
        return
    partial = path.with_name(f"{path.name}{PARTIAL}")
    with partial.open("wb") as file:
        head = _head(tensors, NO_SUM_YET)
        file.write(head)
        told = _write_all(tensors, file)
        file.seek(0)
        file.write(_head(tensors, told))
    flush(partial)
    partial.replace(path)


def _head(tensors: Mapping[str, Tensor], told: str) -> bytes:
    """What stands before the bytes: where each tensor's are, and the sum; as long for every sum."""
    entries = tuple(Entry.of(name, tensors[name]) for name in sorted(tensors))
    return Shard("", entries).header({SUM: told})


def _write_all(tensors: Mapping[str, Tensor], file: BinaryIO) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = whole(tensors[name]).detach().contiguous().cpu()
        _add(digest, name, tensor)
        file.write(_bytes_of(tensor))
    return digest.hexdigest()


class SavedState(TensorsInFile):
    """What `write_state` wrote; told: the sum that it has of itself."""

    def __init__(self, path: Path):
        super().__init__(path)
        with safe_open(path, "pt") as file:
            self.told = (file.metadata() or {}).get(SUM)


class TrainedTensors(Mapping[str, Tensor]):
    """What a saved state has of the trained parameters, by their names in the model."""

    def __init__(self, state: Mapping[str, Tensor]):
        self.state = state
        self.names = [n.removesuffix(WEIGHT) for n in state if n.endswith(WEIGHT)]

    def __getitem__(self, name: str) -> Tensor:
        return self.state[f"{name}{WEIGHT}"]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def read_state(path: Path) -> SavedState:
    """What `write_state` wrote; ValueError where the file is torn, or is not what was written."""
    try:
        state = SavedState(path)
        told = sum_of(state)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    if state.told != told:
        raise ValueError("it has changed since it was written (another sha256)")
    return state


def sum_of(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 over names, shapes and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        _add(digest, name, tensors[name])
    return digest.hexdigest()


def _add(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
    digest.update(_bytes_of(tensor))


def _bytes_of(tensor: Tensor) -> memoryview:
    view: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return view
