"""What was found of each decoder layer, kept beside a checkpoint until it is whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_lab.integrity import (
    PARTIAL,
    damage,
    put_in_place,
    seal_of,
    with_sum,
    without_sum,
    write_whole,
)


class KeptLayers:
    """Tensors of decoder layers, and a note on each, in files that prove themselves.

    What a killed run left is given back as it was, or not at all. folder: with None nothing is
    kept.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder

    def keep(self, layer: int, tensors: Mapping[str, Tensor], note: Any) -> None:
        """Keep a layer, and something that JSON can hold."""
        if self.folder is None:
            return
        self.folder.mkdir(exist_ok=True)
        file, told = self._files(layer)
        partial = file.with_suffix(PARTIAL)
        save_file(dict(tensors), partial)
        put_in_place(partial, file)
        record = {"seal": seal_of(file), "note": note}
        write_whole(told, json.dumps(with_sum(record)) + "\n")

    def read(self, layer: int) -> tuple[dict[str, Tensor], Any] | None:
        """A layer that was kept, and its note; None where it was not, or has changed since."""
        if self.folder is None:
            return None
        file, told = self._files(layer)
        try:
            record = without_sum(json.loads(told.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, AttributeError):
            return None
        if damage(self.folder, {file.name: record["seal"]}, quick=False):
            return None
        return load_file(file), record["note"]

    def remove(self) -> None:
        """All of them, where there are some."""
        if self.folder is not None and self.folder.exists():
            shutil.rmtree(self.folder)

    def _files(self, layer: int) -> tuple[Path, Path]:
        assert self.folder is not None
        name = self.folder / f"{layer:03}"
        return name.with_suffix(".safetensors"), name.with_suffix(".json")
