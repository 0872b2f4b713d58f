"""`--to compressed-tensors`: weights rounded to 4 or 8 bits and packed, as vLLM reads them.

Plain rounding to nearest, symmetric, one scale for each group of inputs (or for each output): no
calibration, which GPTQ and AWQ have. Experts and linear layers are packed; embeddings, the output
matrix, routers and gates stay. The format is "pack-quantized" of compressed-tensors; for 4 and 8
bits all its versions pack alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from moe_lab.export.folder import stored_tensors, write_folder
from moe_lab.export.given import Given
from moe_lab.models.checkpoint import Checkpoint, meta_model
from moe_lab.models.layers import decoders_path, moe_layers
from moe_lab.models.own_config import is_own_form, read_config
from moe_lab.models.reading_back import NotReadBack
from moe_lab.models.stored import Stored, stored_in
from moe_lab.models.weight_files import weight_files
from moe_lab.types import UserError

ENDING = "-compressed-tensors"
OPTIONS = ("bits", "group_size")
TAKES = "checkpoints in their family's own form, with a tensor for each expert"
CHANNEL = "channel"
GROUP_SIZES = ("128", "64", "32", CHANNEL)
PARTS = ("packed", "scale", "shape")
VERSION = "0.17.0"  # of compressed-tensors, whose reading of these files was tried


def export(given: Given, out: Path, bits: int = 4, group_size: str = "128") -> list[str]:
    """Write a checkpoint with its experts and linear layers packed.

    bits: 4 or 8; group_size: inputs that share a scale, one of GROUP_SIZES; channel: all of an
    output's. Raises UserError for widths that the group size does not divide.
    """
    if bits not in (4, 8):
        raise UserError(f"--bits {bits}: it packs 4 or 8")
    if group_size not in GROUP_SIZES:
        raise UserError(f"--group-size {group_size}: there are {', '.join(GROUP_SIZES)}")
    checkpoint = given.checkpoint()
    values = read_config(checkpoint.path / "config.json")
    _check(checkpoint, values)
    packed, left = _chosen(checkpoint)
    size = None if group_size == CHANNEL else int(group_size)
    _check_widths(packed, size)
    config = values | {"quantization_config": _quantisation(bits, size, left)}
    files = _files(checkpoint.path, packed, bits, size)
    write_folder(out, files, config, checkpoint.path)
    largest = _compare(packed, out, bits, size)
    return [
        f"{len(packed)} matrices are packed in {bits} bits, rounded to nearest without "
        f"calibration: at most {largest:.1%} of a matrix's norm is lost"
    ]


def _check(checkpoint: Checkpoint, values: dict[str, Any]) -> None:
    if is_own_form(values):
        raise UserError(
            f"--to compressed-tensors: {checkpoint.path} is in moe_lab's own form, which engines "
            "read by moe_lab's plugin alone, and unpacked: it takes families' own forms"
        )
    if values.get("quantization_config"):
        raise UserError(f"--to compressed-tensors: {checkpoint.path} is quantised already")


def _chosen(checkpoint: Checkpoint) -> tuple[dict[str, Stored], list[str]]:
    """The matrices to be packed by their names in the files, and the linear modules that stay.

    The latter by their paths in the files and, where these differ, in the model. Packed are those
    inside decoder layers but routers and the gates of shared experts.
    """
    model = meta_model(checkpoint.config)
    layers = moe_layers(model)
    decoders = decoders_path(layers[0].info.name)
    experts = {layer.experts for layer in layers}
    gates = {
        module
        for layer in layers
        for holder in (layer.router, layer.shared_gate)
        for module in (holder.modules() if holder else ())
    }
    packed: dict[str, Stored] = {}
    left = {"lm_head": None}  # a dictionary for its order
    for name, parts in checkpoint.held_by(model).by_name.items():
        path, _, kind = name.rpartition(".")
        module = model.get_submodule(path)
        of_expert = module in experts and kind.endswith("_proj")
        linear = isinstance(module, nn.Linear) and kind == "weight"
        if of_expert or (linear and module not in gates and name.startswith(f"{decoders}.")):
            packed |= {one.key: one for one in parts}
        elif linear or (module in gates and kind == "weight"):
            left |= {one.key.removesuffix(".weight"): None for one in parts} | {path: None}
    return packed, list(left)


def _check_widths(packed: dict[str, Stored], size: int | None) -> None:
    """Refuse what is no matrix of its own, and inputs that groups of this size do not divide."""
    widths: dict[int, str] = {}
    for key, one in packed.items():
        with safe_open(one.file, "pt") as opened:
            shape = opened.get_slice(key).get_shape()
        if len(shape) != 2 or not key.endswith(".weight"):
            raise UserError(
                f"--to compressed-tensors: this family's files have all experts in one tensor "
                f"({key}), and the format packs a matrix for each expert"
            )
        widths.setdefault(shape[1], key)
    odd = [width for width in widths if size and width % size]
    if odd:
        fit = [
            each
            for each in GROUP_SIZES
            if each == CHANNEL or not any(width % int(each) for width in widths)
        ]
        raise UserError(
            f"--group-size {size} does not divide the {odd[0]} inputs of {widths[odd[0]]}; what "
            f"fits all matrices: {', '.join(fit)}"
        )


def _quantisation(bits: int, size: int | None, left: list[str]) -> dict[str, Any]:
    """What config.json says of the packed weights."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if size else "channel",
        "group_size": size,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
    }
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": left,
        "version": VERSION,
    }


def _files(
    folder: Path, packed: dict[str, Stored], bits: int, size: int | None
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    for file in weight_files(folder):
        tensors: dict[str, Tensor] = {}
        for one in stored_in(file):
            weight = one.load()
            if one.key not in packed:
                tensors[one.key] = weight
                continue
            levels, scale = rounded(weight, bits, size)
            tensors[f"{one.key}_packed"] = pack(levels, bits)
            tensors[f"{one.key}_scale"] = scale
            tensors[f"{one.key}_shape"] = torch.tensor(weight.shape)
        yield file.name, tensors


def rounded(weight: Tensor, bits: int, size: int | None) -> tuple[Tensor, Tensor]:
    """A matrix [out, in] as whole numbers of `bits` bits, int8, and their scales [out, in/size].

    size: inputs that share a scale, None for all. The largest weight of a group is half a level
    beyond the highest number, as the format's own observer has it; scales have the weight's dtype.
    """
    groups = weight.float().unflatten(1, (-1, size or weight.shape[1]))
    largest = groups.abs().amax(dim=-1)
    scale = (largest / ((2**bits - 1) / 2)).to(weight.dtype)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    levels = (groups / scale.float()[..., None]).round()
    return levels.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(torch.int8).flatten(1), scale


def pack(levels: Tensor, bits: int) -> Tensor:
    """Whole numbers [out, in] as int32 [out, in * bits / 32]: the first ones in the lowest bits."""
    each = 32 // bits
    shifted = levels.to(torch.int64) + 2 ** (bits - 1)
    shifted = nn.functional.pad(shifted, (0, -levels.shape[1] % each)).unflatten(1, (-1, each))
    words = (shifted << (torch.arange(each) * bits)).sum(dim=-1)
    signed: Tensor = torch.where(words >= 2**31, words - 2**32, words)
    packed: Tensor = signed.to(torch.int32)
    return packed


def unpack(words: Tensor, bits: int, shape: tuple[int, int]) -> Tensor:
    """The inverse of `pack`, int8 [out, in]."""
    shifts = torch.arange(32 // bits) * bits
    found: Tensor = (words.to(torch.int64)[..., None] >> shifts) & (2**bits - 1)
    levels: Tensor = found.flatten(1)[:, : shape[1]] - 2 ** (bits - 1)
    return levels.to(torch.int8)


def dequantised(tensors: Mapping[str, Tensor], key: str, bits: int) -> Tensor:
    """The matrix that a reader makes of what is stored of it."""
    scale = tensors[f"{key}_scale"]
    out, width = tensors[f"{key}_shape"].tolist()
    levels = unpack(tensors[f"{key}_packed"], bits, (out, width))
    groups = levels.to(scale.dtype).unflatten(1, (scale.shape[1], -1))
    read: Tensor = (groups * scale[..., None]).flatten(1)
    return read


def _compare(packed: Mapping[str, Stored], out: Path, bits: int, size: int | None) -> float:
    """Read what was written; the largest share of a matrix's norm that rounding took."""
    written, lost = stored_tensors(out), 0.0
    for key, one in packed.items():
        parts = {name: written[name].load() for name in (f"{key}_{part}" for part in PARTS)}
        weight, read = one.load().float(), dequantised(parts, key, bits).float()
        # Half a level, and what the scale and the product lose in their dtype.
        bound = 0.51 + 2 ** (bits - 1) * torch.finfo(parts[f"{key}_scale"].dtype).eps
        level = parts[f"{key}_scale"].float().repeat_interleave(size or weight.shape[1], dim=1)
        if read.shape != weight.shape or ((read - weight).abs() > bound * level).any():
            raise NotReadBack(f"{out} was read back, and {key} is another matrix. Please report it")
        lost = max(lost, float((read - weight).norm() / weight.norm().clamp(min=1e-12)))
    return lost
