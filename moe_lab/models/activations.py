"""Tensors by key, in memory up to a limit and in files beyond it."""

from __future__ import annotations

import logging
import shutil
import tempfile
import weakref
from collections.abc import Hashable, Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_lab.types import UserError

logger = logging.getLogger(__name__)


class Activations:
    """Tensors by key: in main memory up to `limit` bytes in all, the others in files.

    folder: where the files go (it is made when the first is written, and removed in the end);
    device: where a tensor is handed out.
    """

    def __init__(self, limit: int, folder: Path | None = None, device: str = "cpu"):
        self.limit, self.folder, self.device = limit, folder, device
        self.held = 0
        self.spilled = 0
        self._memory: dict[Hashable, Tensor] = {}
        self._files: dict[Hashable, Path] = {}
        self._written = 0
        self._home: Path | None = None

    def __setitem__(self, key: Hashable, value: Tensor) -> None:
        self.pop(key)
        size = value.numel() * value.element_size()
        if self.held + size <= self.limit:
            self._memory[key] = value.to("cpu")
            self.held += size
            return
        if self._home is None:
            self._home = Path(tempfile.mkdtemp(prefix="activations_", dir=self.folder))
            weakref.finalize(self, shutil.rmtree, self._home, ignore_errors=True)
        path = self._home / f"{self._written}.safetensors"
        self._written += 1
        self.spilled += size
        save_file({"value": value.contiguous().cpu()}, path)
        self._files[key] = path

    def __getitem__(self, key: Hashable) -> Tensor:
        if key in self._memory:
            return self._memory[key].to(self.device)
        return load_file(self._files[key], device=self.device)["value"]

    def announce(self, needs: Mapping[str, int]) -> None:
        """Say what will be kept (in bytes, one after the other), and where; UserError if nowhere.

        The memory that earlier tensors hold counts; the disk has to take what is left over.
        """
        spilled = max(0, self.held + max(needs.values()) - self.limit)
        words = ", ".join(f"{what} up to {_gib(size)}" for what, size in needs.items())
        folder = self.folder or Path(tempfile.gettempdir())
        rest = f"{_gib(spilled)} of it in files under {folder}" if spilled else "all in memory"
        logger.info("activations: %s; %s (compute.cache_gib)", words, rest)
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
        value = self._memory.pop(key, None)
        if value is not None:
            self.held -= value.numel() * value.element_size()
        path = self._files.pop(key, None)
        if path is not None:
            path.unlink()


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
