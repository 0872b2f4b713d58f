"""Whether a checkpoint's files hold the tensors that its config asks for: by headers alone.

Tensors without values, of the dtypes and shapes in the files' headers, are loaded into a model
without weights by the very function that loads a checkpoint, so that every family's conversions
apply, and what does not fit is known before a byte of a weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import LoadStateDictConfig

from moe_lab.models.layers import moe_layers
from moe_lab.models.opening import no_bars, text_config
from moe_lab.models.quantised import (
    conversions,
    is_quantised,
    packed_as,
    quantised_as,
    quantizer_of,
)
from moe_lab.models.stored import STORED_DTYPES, Stored, held_by, stored_in
from moe_lab.models.uneven import load_tensors
from moe_lab.types import UserError

_LAYER = re.compile(r"\.layers\.(\d+)(?=\.)")


def check_fit(
    folder: Path, model: PreTrainedModel, files: Sequence[Path], ignored: Sequence[str] = ()
) -> None:
    """Refuse files that lack tensors of a model, have others of its layers, or other shapes.

    model: without weights; it is used up. ignored: patterns of the names, in the files, of tensors
    that may be lost. Raises UserError with the names of tensors, and their shapes.
    """
    _check_rotary(folder, model)
    held = held_by(model, files)
    stored = [one for parts in held.by_name.values() for one in parts]
    _check_kinds(folder, model, held.by_name)
    _check_unknown(folder, model, held.others, ignored)
    if quantised_as(model.config):
        _check_factors(files)
    names = {one.key: name for name, parts in held.by_name.items() for one in parts}
    try:
        info = _loaded(model, {one.key: _like(one) for one in stored})
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    if mismatched := sorted(info.mismatched_keys):
        name, found, wanted = mismatched[0]
        raise UserError(
            f"{folder}: {_keys_of(names, name)} {_shape(found)} in its files, and config.json asks "
            f"for {_shape(wanted)}{_more(mismatched)}"
        )
    if info.conversion_errors:
        name, message = next(iter(sorted(info.conversion_errors.items())))
        told = next((one for one in stored if names[one.key] == name), None)
        shape = f", such as {told.key} {_shape(told.shape)}" if told else ""
        raise UserError(
            f"{folder}: the tensors of {name}{shape}, do not fit together: {_last_line(message)}"
        )
    model._adjust_missing_and_unexpected_keys(info)  # what its class makes itself may be missing
    if missing := sorted(set(info.missing_keys) - _tied(model, set(info.missing_keys))):
        raise UserError(
            f"{folder} lacks {len(missing)} tensors that its config asks for, such as {missing[0]} "
            f"{_shape(model.state_dict()[missing[0]].shape)}: without them there is no model. Is "
            "config.json that of these weights?"
        )


def _loaded(model: PreTrainedModel, tensors: dict[str, Tensor]) -> Any:
    dtype = model.dtype
    how = LoadStateDictConfig(
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        device_map={"": "meta"},
        weight_mapping=conversions(model),
        hf_quantizer=quantizer_of(model.config),
    )
    with no_bars():
        return load_tensors(model, tensors, how)


def _like(one: Stored) -> Tensor:
    return torch.empty(one.shape, dtype=STORED_DTYPES[one.kind], device="meta")


def _check_rotary(folder: Path, model: PreTrainedModel) -> None:
    """Refuse a rotary embedding of another width than the part of the heads that it turns.

    No weight has that width where attention is latent, so that no shape would tell.
    """
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        wanted, buffer = (
            getattr(one, name, None)
            for one, name in ((config, "qk_rope_head_dim"), (module, "inv_freq"))
        )
        if wanted and buffer is not None and 2 * len(buffer) != wanted:
            raise UserError(
                f"{folder}/config.json: head_dim={config.head_dim} makes a rotary embedding of "
                f"{2 * len(buffer)} dimensions, and qk_rope_head_dim={wanted} are turned"
            )


def _check_kinds(folder: Path, model: PreTrainedModel, by_name: Any) -> None:
    """Refuse weights in dtypes that are none of weights, unless the config says how to read them.

    Tables of whole numbers, as of routers that choose by token id, are no weights.
    """
    quantised, tensors = quantised_as(model.config), model.state_dict()
    every = [one for parts in by_name.values() for one in parts]
    packed = packed_as(model.config)
    none_packed = packed and not any(one.parts for one in every)
    if none_packed or (quantised and not any(is_quantised(one.kind) for one in every)):
        raise UserError(
            f"{folder}/config.json: its quantization_config says {packed or quantised}, and none "
            "of its tensors is quantised: remove that field, if these are the plain weights"
        )
    for name, parts in by_name.items():
        for one in parts:
            plain = one.dtype is not None or not tensors[name].is_floating_point()
            if one.kind in STORED_DTYPES and (plain or (quantised and is_quantised(one.kind))):
                continue
            raise UserError(
                f"{one.file}: {one.key} is stored as {one.kind}"
                + (", which is no dtype of weights" if not is_quantised(one.kind) else "")
                + f", and {folder}/config.json does not say how to read that "
                "(quantization_config): give the unquantised weights"
            )


def _check_factors(files: Sequence[Path]) -> None:
    """Refuse FP8 weights whose factors, which stand beside them, are in no file."""
    stored = {one.key: one for file in files for one in stored_in(file)}
    for key, one in stored.items():
        if one.kind in ("F8_E4M3", "F8_E5M2") and not any(
            f"{key}_{name}" in stored for name in ("scale_inv", "scale")
        ):
            raise UserError(
                f"{one.file}: {key} is stored in FP8, and {key}_scale_inv, by which it is "
                "multiplied, is in no file"
            )


def _check_unknown(
    folder: Path,
    model: PreTrainedModel,
    others: Mapping[str, Sequence[Stored]],
    ignored: Sequence[str],
) -> None:
    """Refuse tensors of modules that the model has, and of decoder layers that it should have."""
    config = text_config(model.config)
    lost = {
        name: parts[0]
        for name, parts in others.items()
        if not all(any(fnmatchcase(one.key, pattern) for pattern in ignored) for one in parts)
    }
    if known := [lost[name] for name in inside_modules(model, lost)]:
        first = known[0].key
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", first)
        raise UserError(
            f"{folder} holds {len(known)} tensors of modules that {config.model_type!r} has, and "
            f"that it does not know there, such as {first} {_shape(known[0].shape)}: what they do "
            "would be lost. Does config.json lack a field that switches them on? If they may go: "
            f'model.ignore_tensors=["{pattern}"] (for each kind), or '
            f'moe_lab.load(path, ignore_tensors=["{pattern}"])'
        )
    behind = _layers_behind(lost, model, config.num_hidden_layers)
    if behind:
        raise UserError(
            f"{folder}/config.json: num_hidden_layers={config.num_hidden_layers}, and its files "
            f"hold the decoder layer {max(behind)}: is config.json that of these weights?"
        )


def inside_modules(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Those of the names that are inside an MoE block of the model, or a module without parts.

    What such tensors do, and the model does not, changes what it computes.
    """
    blocks = tuple(f"{layer.info.name}." for layer in moe_layers(model))
    leaves = {name for name, part in model.named_modules() if next(part.children(), None) is None}
    return [n for n in names if n.startswith(blocks) or n.rpartition(".")[0] in leaves]


def _layers_behind(names: Collection[str], model: PreTrainedModel, number: int) -> set[int]:
    """Numbers of decoder layers that the model has not, and that are as those that it has.

    Layers for multi-token prediction have more than these: what joins the embedding to the state.
    """
    plain = {_LAYER.sub("", name) for name in model.state_dict()}
    found: dict[int, set[str]] = {}
    for name in names:
        match = _LAYER.search(name)
        if match and int(match[1]) >= number:
            found.setdefault(int(match[1]), set()).add(_LAYER.sub("", name))
    return {layer for layer, inside in found.items() if inside <= plain}


def _tied(model: PreTrainedModel, missing: set[str]) -> set[str]:
    """The missing tensors that are another one, which is there."""
    pairs = getattr(model, "all_tied_weights_keys", None) or {}
    return {one for one, other in pairs.items() if one in missing and other not in missing}


def _keys_of(names: dict[str, str], name: str) -> str:
    keys = [key for key, its in names.items() if its == name]
    if len(keys) == 1:
        return f"{keys[0]} is"
    return f"{name} ({keys[0]}, ...) is" if keys else f"{name} is"


def _shape(shape: Sequence[int]) -> str:
    return str(list(shape))


def _more(items: Collection[Any]) -> str:
    return f" ({len(items) - 1} more tensors likewise)" if len(items) > 1 else ""


def _last_line(message: str) -> str:
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith("Error")]  # that is of where, not of what
    return (told or lines or ["no reason is given"])[-1]
