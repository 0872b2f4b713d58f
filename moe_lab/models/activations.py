"""Tensors by key: on the device up to a bound, then in main memory up to one, then in files."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Hashable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_lab.types import UserError

logger = logging.getLogger(__name__)
VALUE = "value"  # what a tensor is called in its file


class Activations:
    """Tensors by key: in main memory up to `limit` bytes in all, the others in files.

    folder: where the files go (it is made when the first is written, and removed in the end);
    device: where a tensor is handed out; device_limit: bytes of those that never leave it, which
    come first. In main memory they are pinned for a GPU, so that copies run at its full speed.
    """

    def __init__(
        self,
        limit: int,
        folder: Path | None = None,
        device: str = "cpu",
        device_limit: int = 0,
    ):
        self.limit, self.folder, self.device = limit, folder, device
        self.device_limit = device_limit
        self.on_device = 0
        self.held = 0
        self.spilled = 0
        self._device: dict[Hashable, Tensor] = {}
        self._memory: dict[Hashable, Tensor] = {}
        self._files: dict[Hashable, Path] = {}
        self._written = 0
        self._home: Path | None = None

    def __setitem__(self, key: Hashable, value: Tensor) -> None:
        self.pop(key)
        size = value.nbytes
        if self.on_device + size <= self.device_limit:
            self._device[key] = value.to(self.device)
            self.on_device += size
        elif self.held + size <= self.limit:
            self._memory[key] = self._in_memory(value)
            self.held += size
        else:
            self._files[key] = self._spill(value)
            self.spilled += size

    def __getitem__(self, key: Hashable) -> Tensor:
        if key in self._device:
            return self._device[key]
        if key in self._memory:
            return self._memory[key].to(self.device, non_blocking=True)
        return load_file(self._files[key], device=self.device)[VALUE]

    def write(self, key: Hashable, path: Path) -> None:
        """Have a tensor in a new file at `path`, too; `read` gets it from there.

        One that lies in a file is linked where the file system can: that costs nothing.
        """
        if key in self._files:
            link_or_copy(self._files[key], path)
            return
        value = self._device[key] if key in self._device else self._memory[key]
        save_file({VALUE: value.contiguous().cpu()}, path)

    def read(self, key: Hashable, path: Path) -> None:
        """Take a tensor from a file that `write` made."""
        self[key] = load_file(path)[VALUE]

    def announce(self, needs: Mapping[str, int]) -> None:
        """Say what will be kept (in bytes, one after the other), and where; UserError if nowhere.

        The memory that earlier tensors hold counts; the disk has to take what is left over.
        """
        kept = self.on_device + self.held
        spilled = max(0, kept + max(needs.values()) - self.limit - self.device_limit)
        words = ", ".join(f"{what} up to {_gib(size)}" for what, size in needs.items())
        folder = self.folder or Path(tempfile.gettempdir())
        rest = f"{_gib(spilled)} of it in files under {folder}" if spilled else "all in memory"
        first = f"{_gib(self.device_limit)} on the device, " if self.device_limit else ""
        logger.info("activations: %s; %s%s (compute.cache_gib)", words, first, rest)
        free = shutil.disk_usage(folder).free
        if spilled > free:
            raise UserError(
                f"activations need {_gib(spilled)} under {folder}, where {_gib(free)} are free: "
                "ask for fewer or shorter samples (calibration.num_samples, "
                "calibration.max_length), allow more memory (compute.cache_gib), or name another "
                "store=<folder>"
            )

    def pop(self, key: Hashable) -> None:
        """Forget a tensor, if it is there."""
        if (value := self._device.pop(key, None)) is not None:
            self.on_device -= value.nbytes
        if (value := self._memory.pop(key, None)) is not None:
            self.held -= value.nbytes
        if (path := self._files.pop(key, None)) is not None:
            path.unlink()

    def _in_memory(self, value: Tensor) -> Tensor:
        if not self.device.startswith("cuda"):
            return value.to("cpu")
        pinned = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        return pinned.copy_(value)

    def _spill(self, value: Tensor) -> Path:
        if self._home is None:
            self._home = Path(tempfile.mkdtemp(prefix="activations_", dir=self.folder))
            weakref.finalize(self, shutil.rmtree, self._home, ignore_errors=True)
        path = self._home / f"{self._written}.safetensors"
        self._written += 1
        save_file({VALUE: value.contiguous().cpu()}, path)
        return path


def link_or_copy(source: Path, target: Path) -> None:
    """The same file under another name, or a copy where the file system has no such links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
