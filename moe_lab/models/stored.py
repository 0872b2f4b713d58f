"""What lies in a checkpoint's files, by the names that its tensors have in the model.

Names on disk differ from those in the model (`transformers.core_model_loading`), several tensors on
disk may be one in the model, and some may be none: what the model's class does not hold, such as
layers for multi-token prediction, would be lost when the model is saved.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, modeling_utils
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from moe_lab.models.packing import LEVEL_WORDS, PARTS, SCALE, SCHEME, SHAPE, Unpacked, unpacked
from moe_lab.models.quantised import conversions, packed_bits
from moe_lab.models.uneven import name_in_model, uneven_tensors

logger = logging.getLogger(__name__)

MADE_BY_MODELS = re.compile(r"rotary_emb\.inv_freq|(?:^|\.)position_ids$")  # no longer stored
NOT_LOADED = "model-not-loaded.safetensors"  # beside the model's own weights, in their index
INDEX = "model.safetensors.index.json"
ONE_OF_SEVERAL = "model-00001-of-00001.safetensors"  # model.safetensors is read without others
# What safetensors call dtypes, those of the same size as a file has them one behind the other.
STORED_DTYPES = {
    "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32,
    "BF16": torch.bfloat16, "F16": torch.float16, "I16": torch.int16,
    "F8_E8M0": torch.float8_e8m0fnu, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
FLOATING = {key: STORED_DTYPES[key] for key in ("F64", "F32", "F16", "BF16")}  # not quantised


@dataclass(frozen=True)
class Stored:
    """A tensor in a checkpoint's file; dtype: None where it is none of floating point.

    kind: its dtype, as safetensors call it; offset: of its first byte in the file. parts: of a
    matrix in few bits, by their names (`packing.py`); its dtype, kind and shape are those of what
    is read of it, its bytes those of all parts. bits: as the config says, where no part does.
    """

    file: Path
    key: str
    dtype: torch.dtype | None
    num_bytes: int
    kind: str
    shape: tuple[int, ...]
    offset: int = 0
    parts: tuple[tuple[str, Stored], ...] = ()
    bits: int | None = None

    def load(self) -> Tensor:
        """The tensor."""
        if self.parts:
            parts = {name: one.load() for name, one in self.parts}
            return unpacked(parts, self.bits).to(self.dtype)
        dtype = STORED_DTYPES.get(self.kind)
        if dtype is None or not self.num_bytes or not self.offset:
            with safe_open(self.file, "pt") as opened:
                tensor: Tensor = opened.get_tensor(self.key)
            return tensor
        # By hand: safetensors parses the whole header again for each tensor.
        values = bytearray(self.num_bytes)
        with self.file.open("rb") as handle:
            handle.seek(self.offset)
            if handle.readinto(values) != self.num_bytes:
                raise OSError(f"{self.file} ends within {self.key}")
        return torch.frombuffer(values, dtype=dtype).reshape(self.shape)

    def files(self) -> set[Path]:
        """Where it lies."""
        return {one.file for _, one in self.parts} or {self.file}

    def slice_of(self, opened: Mapping[Path, Any]) -> Any:
        """A slice of it, which is read when it is asked; opened: its files."""
        if self.parts:
            parts = {name: one.slice_of(opened) for name, one in self.parts}
            return Unpacked(parts, self.bits, self.shape)
        return opened[self.file].get_slice(self.key)


@dataclass(frozen=True)
class Held:
    """A checkpoint's tensors by the names of a model: those that it holds, and the others."""

    by_name: Mapping[str, Sequence[Stored]]
    others: Mapping[str, Sequence[Stored]]

    def dtype(self, name: str) -> torch.dtype | None:
        """In which a tensor of the model is stored; None where it is not, or is no float."""
        return self.by_name[name][0].dtype if name in self.by_name else None


def dtype_name(dtype: torch.dtype) -> str:
    """What a config and `model.dtype` call a dtype: float32."""
    return str(dtype).removeprefix("torch.")


def model_names(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """For each name on disk that of the tensor in the model that it becomes, or is a part of."""
    mapping, names, uneven = conversions(model), model.state_dict(), uneven_tensors(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix = model.base_model_prefix
    renamed = {}
    # In the order of transformers' own loading: some renamings depend on what was seen before.
    for key in sorted(keys, key=dot_natural_key):
        name = rename_source_key(key, renamings, converters, prefix, names)[0]
        if name not in names and key in names:  # as there: a renaming that is not meant for it
            name = rename_source_key(key, [], [], prefix, names)[0]
        whole = name_in_model(key, uneven)
        renamed[key] = name if whole == key else whole
    return renamed


def in_files(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's tensors, or some of them, as transformers writes them, by their names on disk."""
    # Looked up when it is called: `hook.py` has put another one there, which knows our own form.
    revert: Any = vars(modeling_utils)["revert_weight_conversion"]
    written: dict[str, Tensor] = revert(model, dict(tensors))
    return written


def without_tied(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's tensors by name, each once, where several of its names are one tensor."""
    once: dict[str, Tensor] = remove_tied_weights_from_state_dict(dict(tensors), model)
    return once


def held_by(model: PreTrainedModel, files: Iterable[Path]) -> Held:
    """What these files hold of a model, which may be without weights: only headers are read.

    Left out are buffers that models compute, and what quantisation stores beside a weight. The
    parts of a matrix in few bits are one tensor.
    """
    found = {one.key: one for file in files for one in stored_in(file)}
    found = folded(found, packed_bits(model.config))
    by_name: dict[str, list[Stored]] = {}
    for key, name in model_names(model, found).items():
        by_name.setdefault(name, []).append(found[key])
    untaken = sorted(by_name.keys() - model.state_dict().keys())
    others = {name: by_name.pop(name) for name in untaken}
    taken = {one.key for parts in by_name.values() for one in parts}
    needed = {
        name: parts
        for name, parts in others.items()
        if not all(_is_needless(one, taken) for one in parts)
    }
    return Held(by_name, needed)


def _is_needless(one: Stored, taken: Collection[str]) -> bool:
    """Whether a tensor is one that models compute, or a quantisation's beside a weight's own."""
    owner, _, key = one.key.rpartition(".")
    return bool(MADE_BY_MODELS.search(one.key)) or ("scale" in key and f"{owner}.weight" in taken)


def stored_in(file: Path) -> list[Stored]:
    """The tensors of a safetensors file, by its header."""
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(length))
    header.pop("__metadata__", None)
    found = []
    for key, one in header.items():
        (begin, end), kind = one["data_offsets"], one["dtype"]
        size, dtype, offset = end - begin, FLOATING.get(kind), 8 + length + begin
        found.append(Stored(file, key, dtype, size, kind, tuple(one["shape"]), offset))
    return found


def folded(found: Mapping[str, Stored], bits: int | None = None) -> dict[str, Stored]:
    """Tensors of files by their keys, the parts of each matrix in few bits as one.

    bits: as the config says; without, only those that say it themselves are put together.
    """
    rest, parts = dict(found), dict[str, dict[str, Stored]]()
    for key in (key for key in found if key.endswith(f"_{LEVEL_WORDS}")):
        whole = key.removesuffix(f"_{LEVEL_WORDS}")
        own = {name: found[f"{whole}_{name}"] for name in PARTS if f"{whole}_{name}" in found}
        if {SCALE, SHAPE} <= own.keys() and (bits or SCHEME in own):
            parts[whole] = own
            for one in own.values():
                del rest[one.key]
    numbers = _whole_numbers([one[name] for one in parts.values() for name in (SHAPE, SCHEME)
                              if name in one])  # fmt: skip
    return rest | {key: _whole(key, one, numbers, bits) for key, one in parts.items()}


def _whole(
    key: str, parts: Mapping[str, Stored], numbers: Mapping[str, Sequence[int]], bits: int | None
) -> Stored:
    """A matrix that these parts are; numbers: what stands in those that say its form."""
    *front, out, width = numbers[parts[SHAPE].key]
    transposed = SCHEME in parts and numbers[parts[SCHEME].key][1] == -2
    shape = (*front, width, out) if transposed else (*front, out, width)
    scale, size = parts[SCALE], sum(one.num_bytes for one in parts.values())
    every = tuple(parts.items())
    return Stored(scale.file, key, scale.dtype, size, scale.kind, shape, 0, every, bits)


def _whole_numbers(stored: Sequence[Stored]) -> dict[str, list[int]]:
    """What stands in short tensors of int64, each file opened once."""
    found: dict[str, list[int]] = {}
    for file in {one.file for one in stored}:
        with file.open("rb") as handle:
            for one in (one for one in stored if one.file == file):
                handle.seek(one.offset)
                found[one.key] = np.frombuffer(handle.read(one.num_bytes), "<i8").tolist()
    return found


@torch.no_grad()
def in_stored_dtypes(
    tensors: Mapping[str, Tensor], source: Held, default: torch.dtype
) -> dict[str, Tensor]:
    """Tensors of a model, by their names, in the dtypes that they have in the files of its source.

    Where loading has rounded one and nothing has changed it since, it is the file's, byte for byte.
    default: for tensors that the files do not have.
    """
    found = {}
    for name, tensor in tensors.items():
        wanted = source.dtype(name) or default
        plain = not tensor.is_floating_point() or tensor.dtype == wanted
        found[name] = tensor if plain else _unrounded(tensor, wanted, source.by_name.get(name, ()))
    return found


@torch.no_grad()
def round_to_stored(
    model: PreTrainedModel,
    tensors: Mapping[str, Tensor],
    source: Held,
    default: torch.dtype,
    computing: torch.dtype,
) -> None:
    """Give tensors, by their names, the values that `in_stored_dtypes` leaves, in place.

    They are in the dtype that they will be loaded in. computing: that of most; what trained in
    float32 goes back to it.
    """
    in_float32 = model._get_dtype_plan(computing)
    parameters = {id(parameter) for parameter in model.parameters()}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        stored = source.dtype(name) or default
        loaded = torch.float32 if any(part in name for part in in_float32) else computing
        loaded = loaded if id(tensor) in parameters else tensor.dtype
        if (stored, loaded) != (tensor.dtype, tensor.dtype):
            tensor.data = tensor.data.to(stored).to(loaded)


def _unrounded(tensor: Tensor, wanted: torch.dtype, parts: Sequence[Stored]) -> Tensor:
    """A tensor in the dtype `wanted`: the stored one where this one is it up to rounding.

    Of one that lost rows, each row that is left of it.
    """
    if len(parts) != 1 or torch.promote_types(wanted, tensor.dtype) == tensor.dtype:
        return tensor.to(wanted)
    exact = parts[0].load()
    if exact.shape == tensor.shape:
        return exact if torch.equal(exact.to(tensor.dtype), tensor.cpu()) else tensor.to(wanted)
    shapes = zip(exact.shape, tensor.shape, strict=False)
    cut = [at for at, (one, other) in enumerate(shapes) if one != other]
    if exact.dim() != tensor.dim() or len(cut) != 1:
        return tensor.to(wanted)
    return _unrounded_rows(tensor.cpu(), exact, cut[0]).to(tensor.device)


def _unrounded_rows(tensor: Tensor, exact: Tensor, dimension: int) -> Tensor:
    """The rows of `exact` that rounded are those of the tensor, in order; else its own rows."""
    stored = exact.movedim(dimension, 0)
    rounded = stored.to(tensor.dtype)
    rows = tensor.movedim(dimension, 0).to(exact.dtype, copy=True)
    place = 0
    for number, row in enumerate(tensor.movedim(dimension, 0)):
        after = range(place, len(stored))
        found = next((at for at in after if torch.equal(rounded[at], row)), None)
        if found is not None:
            rows[number], place = stored[found], found + 1
    return rows.movedim(0, dimension).contiguous()


def carry_over(others: Sequence[Stored], folder: Path) -> None:
    """Write tensors that no model holds beside the weights in `folder`, byte for byte."""
    if not others:
        return
    names = ", ".join(one.key for one in others[:4]) + (", ..." if len(others) > 4 else "")
    logger.info("%d tensors that the model does not load come along: %s", len(others), names)
    index = folder / INDEX
    if index.is_file():
        values = json.loads(index.read_text())
    else:
        (single,) = folder.glob("*.safetensors")
        whole = single.rename(folder / ONE_OF_SEVERAL)
        own = stored_in(whole)
        size = sum(one.num_bytes for one in own)
        weight_map = dict.fromkeys((one.key for one in own), whole.name)
        values = {"metadata": {"total_size": size}, "weight_map": weight_map}
    save_file({one.key: one.load() for one in others}, folder / NOT_LOADED, {"format": "pt"})
    values["weight_map"] |= {one.key: NOT_LOADED for one in others}
    values["metadata"]["total_size"] += sum(one.num_bytes for one in others)
    index.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
