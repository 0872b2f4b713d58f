"""Families whose checkpoints transformers does not read: one file each, named as their model_type.

A family's file says how its checkpoint becomes one of a family that transformers does read:

    native_config(values)         config.json of the original -> that of the native form
    original_shapes(values)       every tensor that the original must hold, with its shape
    is_buffer(name)               whether a tensor is a computed one, to be left out
    native_tensors(name, tensor)  one original tensor -> the native ones that follow from it
    adapt_texts(folder)           change the copied tokenizer files where that is needed

Remote code that lies beside such a checkpoint is never run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_lab.lookup import module_in, names_in
from moe_lab.progress import progress
from moe_lab.types import UserError


def family_of(model_type: str | None) -> ModuleType | None:
    """The file of a family; None for those that transformers reads by itself."""
    return module_in(__package__, model_type) if model_type in names_in(__package__) else None


def known_family(model_type: str) -> ModuleType:
    """The file of one of these families."""
    return module_in(__package__, model_type)


def check_original(family: ModuleType, values: Mapping[str, Any], files: Sequence[Path]) -> None:
    """Refuse a checkpoint that cannot be converted, by its config and the headers of its files.

    Raises UserError where the native form cannot say it, or its tensors are not its family's.
    """
    family.native_config(values)
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(file, "pt") as shard:
            for name in shard.offset_keys():
                shapes[name] = tuple(shard.get_slice(name).get_shape())
    wanted = family.original_shapes(values)
    unknown = [name for name in shapes if name not in wanted and not family.is_buffer(name)]
    missing = [name for name in wanted if name not in shapes]
    reshaped = [
        f"{name} {list(shapes[name])} (not {list(shape)})"
        for name, shape in wanted.items()
        if shapes.get(name, shape) != shape
    ]
    wrong = {"missing": missing, "unknown": unknown, "of another shape": reshaped}
    told = [f"{len(names)} {what}: {_some(names)}" for what, names in wrong.items() if names]
    if told:
        raise UserError(
            f"{files[0].parent} is no checkpoint that moe_lab can convert: its config.json asks "
            f"for {len(wanted)} tensors of the family {values['model_type']!r}; {'; '.join(told)}"
        )


def convert_weights(family: ModuleType, files: Sequence[Path], target: Path) -> int:
    """Write the native tensors, a shard for a shard, and their index; returns their elements.

    Never more than one shard lies in memory. Each tensor keeps its dtype.
    """
    weight_map: dict[str, str] = {}
    size = elements = 0
    for number, file in enumerate(progress(files, "convert: weight files"), start=1):
        shard_name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        native: dict[str, Tensor] = {}
        with safe_open(file, "pt") as shard:
            for name in shard.offset_keys():
                if not family.is_buffer(name):
                    native |= family.native_tensors(name, shard.get_tensor(name))
        save_file(native, target / shard_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(native, shard_name)
        size += sum(tensor.nbytes for tensor in native.values())
        elements += sum(tensor.numel() for tensor in native.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    return elements


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
