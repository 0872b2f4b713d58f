"""Writing MTP layers (`mtp.py`) beside a model that transformers has saved without them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from moe_lab.models.checkpoint import Checkpoint, meta_model
from moe_lab.models.edits.base import Edit
from moe_lab.models.edits.plan import restructure_model
from moe_lab.models.forms import choose_form, padding_limit
from moe_lab.models.layers import moe_layers
from moe_lab.models.mtp import (
    EXPERT,
    MtpLayers,
    checked,
    decoder_number,
    experts_left,
    find_mtp,
    kept_experts,
    of_router,
)
from moe_lab.models.mtp_widths import Narrowed, cut_units, kept_units, units_left
from moe_lab.models.opening import text_config
from moe_lab.models.own_config import read_config, write_config
from moe_lab.models.stored import INDEX, ONE_OF_SEVERAL
from moe_lab.models.weight_files import weight_files
from moe_lab.types import MtpName, UserError

# What configs call the number of MTP layers: DeepSeek-V3, GLM-4.5, Ling, Nemotron-H and most
# others; Qwen3.5; Inkling; MiniMax-M2.
MTP_COUNTS = (
    "num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "num_mtp_modules",
)  # fmt: skip
MTP_SWITCHES = ("use_mtp", "enable_mtp")
# What stands there for each of these layers, and says nothing where there are none.
MTP_LISTS = (
    "mtp_layer_types", "mtp_mlp_layer_types", "mtp_layers_block_type", "mtp_local_layer_ids",
    "mtp_hybrid_override_pattern",
)  # fmt: skip
FACTORS = "_scale_inv"  # what the name of an fp8 weight's factors ends in


def foresee_mtp(checkpoint: Checkpoint, edits: Iterable[Edit], how: MtpName) -> None:
    """Refuse, before any weight is read, what `carry_mtp` would refuse of a checkpoint's edits."""
    if how != "keep":
        return
    mtp = find_mtp(checkpoint.config, weight_files(checkpoint.path))
    if mtp.num_experts:
        before, model = (meta_model(checkpoint.config) for _ in range(2))
        restructure_model(model, edits)
        form = choose_form(model, padding_limit(checkpoint.config, None))
        experts_left(mtp, _counts(model), form.stock, how)
        units_left(mtp, before, model, form.stock, how)


def carry_mtp(
    mtp: MtpLayers,
    config: Any,
    model: PreTrainedModel,
    source: Path,
    folder: Path,
    how: MtpName,
    stock: bool,
) -> str:
    """Bring the MTP tensors of `source` into the checkpoint of `model` that `folder` holds.

    mtp, config: what `source` has of them, and its config; stock: whether the checkpoint is of its
    family's own form. Returns in a sentence what became of them, "" where there are none. Its
    config says 0 MTP layers where the folder then holds none.
    """
    if not mtp.files or how == "drop":
        _say_none(folder / "config.json")
        return f"MTP layers: {len(mtp.files)} tensors left out" if mtp.files else ""
    numbers = experts_left(mtp, _counts(model), stock, how)
    kept = {block: kept_experts(mtp, block, number) for block, number in numbers.items()}
    quantised = _quantised_before(config, folder)
    left = units_left(mtp, meta_model(config), model, stock, how)
    units = kept_units(mtp, left, lambda name: _read(mtp, name, quantised)) if left else {}

    def made(name: str) -> Tensor:
        whole = cut_units(mtp, name, _read(mtp, name, quantised), left, units)
        return _cut(mtp, name, whole, kept)

    size = _write(mtp, kept, text_config(model.config).num_hidden_layers, folder, quantised, made)
    _promise(folder / "config.json", source / "config.json")
    whole = sorted({n for block, n in mtp.num_experts.items() if block not in kept})
    if not stock and whole:
        _say_whole(folder / "config.json", {**mtp.num_experts, **numbers})
    told = f"MTP layers ({size / 2**30:.3g} GiB, which no size of the model counts)"
    words = [_told(mtp, numbers, whole), *_told_units(left)]
    return f"{told}: {', '.join(words)}{', dequantised as all others' * bool(quantised)}"


def _counts(model: PreTrainedModel) -> set[int]:
    return {layer.info.num_experts for layer in moe_layers(model)}


def _told(mtp: MtpLayers, numbers: dict[str, int], whole: list[int]) -> str:
    told = f"{len(mtp.files)} tensors come along"
    if numbers:
        before = " and ".join(map(str, sorted({mtp.num_experts[block] for block in numbers})))
        return (
            f"{told}, pruned from {before} to {max(numbers.values())} experts, those with the "
            "longest router rows (no statistics are known of them)"
        )
    return told + (f", with all {' and '.join(map(str, whole))} experts" if whole else "")


def _told_units(left: Narrowed) -> Iterator[str]:
    for what, pair in (("experts", left.experts), ("shared experts", left.shared)):
        if pair and pair[1] < pair[0]:
            yield (
                f"their {what} narrowed from {pair[0]} to {pair[1]} hidden units, those with the "
                "longest weights"
            )
        elif pair:
            yield f"their {what} filled up with zeros from {pair[0]} to {pair[1]} hidden units"


def _quantised_before(config: Any, folder: Path) -> Quantised | None:
    """How the source is quantised, where what was written beside the MTP layers is no longer so.

    An engine takes them for what the config says. UserError for a way that is not known here.
    """
    before = getattr(config, "quantization_config", None)
    if not before or "quantization_config" in read_config(folder / "config.json"):
        return None
    values = before if isinstance(before, dict) else before.to_dict()
    if values.get("quant_method") != "fp8":
        raise UserError(
            "the model was dequantised to be edited, and its MTP layers are quantised by "
            f"{values.get('quant_method')}, which is not undone here (only fp8 is): "
            "method.mtp=drop leaves them out, or compress a checkpoint that is not quantised"
        )
    rows, columns = values.get("weight_block_size") or (None, None)
    return Quantised(rows, columns, config.dtype or torch.bfloat16)


class Quantised(NamedTuple):
    """fp8 weights, a factor for each block of so many rows and columns; None: for a whole one.

    dtype: in which they are written.
    """

    rows: int | None
    columns: int | None
    dtype: torch.dtype

    def undone(self, weight: Tensor, factor: Tensor) -> Tensor:
        """The weight, times its factors."""
        factor = factor.float()
        if self.rows and self.columns and factor.dim() >= 2:
            factor = factor.repeat_interleave(self.rows, dim=-2)[..., : weight.shape[-2], :]
            factor = factor.repeat_interleave(self.columns, dim=-1)[..., : weight.shape[-1]]
        return (weight.float() * factor).to(self.dtype)


def _write(
    mtp: MtpLayers,
    kept: dict[str, list[int]],
    behind: int,
    folder: Path,
    quantised: Quantised | None,
    made: Callable[[str], Tensor],
) -> int:
    """Write the tensors as files of their own, each read back, and enter them in the index.

    made: what a tensor becomes, by its name at the source. Returns their bytes.
    """
    places, before = _indexed(folder)
    size = 0
    sources = sorted(set(mtp.files.values()))
    for number, source in enumerate(sources, start=1):
        target = folder / f"model-mtp-{number:05}-of-{len(sources):05}.safetensors"
        tensors = {}
        for name in (name for name, file in mtp.files.items() if file == source):
            new = _new_name(mtp, name, kept, behind)
            if new is not None and not (quantised and name.endswith(FACTORS)):
                tensors[new] = made(name)
        if not tensors:
            continue
        save_file(tensors, target, metadata={"format": "pt"})
        _compare(target, tensors)
        places |= dict.fromkeys(tensors, target.name)
        size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": before + size}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return size


def _read(mtp: MtpLayers, name: str, quantised: Quantised | None) -> Tensor:
    """A tensor of the source, dequantised where it was `quantised` there; it is finite."""
    with safe_open(mtp.files[name], "pt") as handle:
        tensor: Tensor = handle.get_tensor(name)
    factors = name + FACTORS
    if quantised is None or factors not in mtp.files:
        return checked(name, tensor)
    with safe_open(mtp.files[factors], "pt") as handle:
        return checked(name, quantised.undone(tensor, handle.get_tensor(factors)))


def _new_name(mtp: MtpLayers, name: str, kept: dict[str, list[int]], behind: int) -> str | None:
    """What a tensor is called in the end; None for one of an expert that goes."""
    new = name
    match = EXPERT.match(name)
    if match and match["number"] and match["block"] in kept:
        if int(match["number"]) not in kept[match["block"]]:
            return None
        place = kept[match["block"]].index(int(match["number"]))
        new = f"{match['block']}.experts.{place}.{match['rest']}"
    for path in mtp.decoders:
        if (number := decoder_number(name, [path])) >= 0:
            rest = new.removeprefix(f"{path}.{number}.")
            return f"{path}.{number - mtp.behind + behind}.{rest}"
    return new


def _cut(mtp: MtpLayers, name: str, tensor: Tensor, kept: dict[str, list[int]]) -> Tensor:
    """The part of a tensor that is of the kept experts, where it is of all experts of a block."""
    for block, experts in kept.items():
        match, whole = EXPERT.match(name), mtp.num_experts[block]
        if match and match["block"] == block and not match["number"]:
            return _rows(tensor, 0, experts)
        if of_router(name, block) and whole in tensor.shape:
            return _rows(tensor, list(tensor.shape).index(whole), experts)
    return tensor


def _rows(tensor: Tensor, dimension: int, kept: Sequence[int]) -> Tensor:
    return torch.stack([tensor.select(dimension, one) for one in kept], dimension).contiguous()


def _compare(file: Path, tensors: dict[str, Tensor]) -> None:
    """Read a written file back: every bit must be there."""
    with safe_open(file, "pt") as handle:
        for name, tensor in tensors.items():
            read = handle.get_tensor(name)
            same = read.dtype == tensor.dtype and read.shape == tensor.shape
            if not same or not torch.equal(_bytes(read), _bytes(tensor)):
                raise RuntimeError(f"{file}: {name} was not written as it is")


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _indexed(folder: Path) -> tuple[dict[str, str], int]:
    """Each tensor's file, and the bytes of all tensors, of a folder that transformers wrote.

    Its only file is renamed as one of several: it would be read without the others.
    """
    if not (folder / INDEX).is_file():
        single = folder / "model.safetensors"
        files = [single.rename(folder / ONE_OF_SEVERAL)]
    else:
        files = weight_files(folder)
    places: dict[str, str] = {}
    size = 0
    for file in files:
        with safe_open(file, "pt") as handle:
            places |= dict.fromkeys(list(handle.keys()), file.name)
        with file.open("rb") as opened:
            size += file.stat().st_size - 8 - int.from_bytes(opened.read(8), "little")
    return places, size


def _promise(path: Path, source: Path) -> None:
    """Make a config.json promise the MTP layers that its source promises."""
    values, told = map(read_config, (path, source))
    for name in MTP_COUNTS:
        if told.get(name) and not values.get(name):
            values[name] = told[name]
    write_config(path, values)


def _say_none(path: Path) -> None:
    """Make a config.json promise no MTP layers."""

    none: dict[str, Any] = dict.fromkeys(MTP_COUNTS, 0) | dict.fromkeys(MTP_SWITCHES, False)
    none |= dict.fromkeys(MTP_LISTS)

    def without(values: dict[str, Any]) -> dict[str, Any]:
        return {
            key: without(value) if isinstance(value, dict) else none.get(key, value)
            for key, value in values.items()
        }

    values = read_config(path)
    if (agreeing := without(values)) != values:
        write_config(path, agreeing)


def _say_whole(path: Path, num_experts: dict[str, int]) -> None:
    """Say in our own form how many experts each MoE block of the MTP layers has."""
    values = read_config(path)
    values["moe_lab"]["mtp_experts"] = num_experts
    write_config(path, values)
