"""A checkpoint's folder, written from tensors one weight file at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from moe_lab.models.own_config import write_config
from moe_lab.models.finishing import copy_text_files
from moe_lab.models.stored import INDEX, Stored, stored_in
from moe_lab.models.weight_files import weight_files


def write_folder(
    out: Path,
    files: Iterable[tuple[str, dict[str, Tensor]]],
    config: Mapping[str, Any],
    source: Path,
) -> None:
    """Write weights by the names of their files, config.json, and what else lies at `source`."""
    out.mkdir()
    weight_map: dict[str, str] = {}
    size = 0
    for name, tensors in files:
        save_file(tensors, out / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if len(set(weight_map.values())) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (out / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    write_config(out / "config.json", config)
    copy_text_files(source, out)


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """The tensors of a checkpoint's files by their names there, of which only headers are read."""
    return {one.key: one for file in weight_files(folder) for one in stored_in(file)}
