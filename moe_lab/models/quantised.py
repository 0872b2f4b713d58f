"""Checkpoints whose weights are quantised: which of them are read, and that they are dequantised.

What is compressed are weights that can be averaged, scaled and trained. FP8 (with factors for
blocks, as of DeepSeek-V3) and MXFP4 (as of gpt_oss) become such by transformers' own operations as
they are loaded; so do whole numbers that compressed-tensors packed, of one scheme without zero
points, which `stored.py` unpacks where a model is read layer by layer. What is written of it then
is dequantised, and larger than its source. Others are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.quantizers.auto import AutoHfQuantizer

from moe_lab.models.own_config import OWN, QUANTISED
from moe_lab.models.rounding import BITS
from moe_lab.types import UserError

DEQUANTISED = {"fp8": "FP8", "mxfp4": "MXFP4"}
COMPRESSED_TENSORS = "compressed-tensors"
PACK_QUANTIZED = "pack-quantized"
ONLY = (
    f"Dequantised on loading are only {' and '.join(DEQUANTISED.values())}, and whole numbers that "
    f"{COMPRESSED_TENSORS} packed"
)
FIELDS = ("quantization_config", "compression_config")  # the second is an older name of the first
UNQUANTISED = (
    "give the unquantised weights, which most publishers have beside (the repository that this one "
    "names as its base model)"
)


def check_quantisation(config_file: object, values: Mapping[str, Any]) -> None:
    """Refuse a config's ways to quantise that are not undone here.

    config_file: as messages call it; values: the config's, in which those of parts are looked at,
    too.
    """
    for field in FIELDS:
        told = values.get(field)
        if told is None:
            continue
        if not isinstance(told, dict):
            raise UserError(f"{config_file}: {field}={told!r} must be an object or null")
        method = _method(told)
        if method == COMPRESSED_TENSORS and field == FIELDS[0]:
            _check_packed(config_file, told)
        elif method not in DEQUANTISED or field != FIELDS[0]:
            raise UserError(
                f"{config_file}: the weights are quantised ({field}: {method}), and moe_lab edits "
                f"weights that are not; {UNQUANTISED}. {ONLY}"
            )
        try:
            AutoHfQuantizer.from_config(told | {"dequantize": True}, pre_quantized=True)
        except (TypeError, ValueError) as error:
            raise UserError(f"{config_file}: {field}={told!r}: {error}") from error
    for part in (part for part in values.values() if isinstance(part, dict)):
        if any(field in part for field in FIELDS):
            check_quantisation(config_file, part)


def _check_packed(config_file: object, told: Mapping[str, Any]) -> None:
    """Refuse what compressed-tensors stores in another way than packed whole numbers of one scheme.

    With zero points, or bits that differ, transformers would take experts for something else.
    """
    groups = told.get("config_groups")
    group: Any = next(iter(groups.values()), None) if isinstance(groups, dict) else None
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(groups, dict) or not isinstance(weights, dict) or len(groups) != 1:
        raise UserError(
            f"{config_file}: {FIELDS[0]}: {COMPRESSED_TENSORS} with {_number_of(groups)}, and one "
            f"is read, whose scheme all packed weights have; {UNQUANTISED}. {ONLY}"
        )
    wanted = {
        "format": (group.get("format") or told.get("format"), (PACK_QUANTIZED,)),
        "type": (weights.get("type"), ("int",)),
        "num_bits": (weights.get("num_bits"), tuple(BITS)),
        "strategy": (weights.get("strategy"), ("group", "channel")),
        "symmetric": (weights.get("symmetric", True), (True,)),
        "actorder": (weights.get("actorder"), (None, "static", "weight")),
        "input_activations": (group.get("input_activations"), (None,)),
    }
    for name, (value, possible) in wanted.items():
        if value not in possible:
            raise UserError(
                f"{config_file}: {FIELDS[0]}: {COMPRESSED_TENSORS} with {name}={value!r}, and read "
                f"is {' or '.join(map(str, possible))}; {UNQUANTISED}"
            )


def _number_of(groups: Any) -> str:
    number = len(groups) if isinstance(groups, dict) else 0
    return f"{number} groups of weights (config_groups)"


def packed_bits(config: Any) -> int | None:
    """Bits of the whole numbers that compressed-tensors packed of this config's weights, if any."""
    told = _told(config)
    if told is None or _method(told) != COMPRESSED_TENSORS:
        return None
    (group,) = told["config_groups"].values()
    return int(group["weights"]["num_bits"])


def dequantising(config: Any) -> Any:
    """The config, told to dequantise on loading whatever the machine can compute with; in place."""
    for part in (config, config.get_text_config(decoder=True)):
        told = getattr(part, FIELDS[0], None)
        if isinstance(told, dict):
            part.quantization_config = told | {"dequantize": True}
    return config


def quantizer_of(config: Any) -> Any:
    """What transformers dequantises tensors of a checkpoint of this config with; None for none."""
    told = _told(config)
    if told is None or _method(told) == COMPRESSED_TENSORS:  # that is unpacked as it is read
        return None
    return AutoHfQuantizer.from_config(told | {"dequantize": True}, pre_quantized=True)


def conversions(model: PreTrainedModel) -> Any:
    """How transformers makes the tensors of a model, with or without weights, from a checkpoint's.

    Dequantised, where its config says that they are quantised.
    """
    return get_model_conversion_mapping(model, hf_quantizer=quantizer_of(model.config))


def quantised_as(config: Any) -> str | None:
    """In which way a checkpoint of this config is stored, in a word; None for plain weights.

    None also for whole numbers that are unpacked as they are read: `packed_as`.
    """
    told = _told(config)
    return None if told is None else DEQUANTISED.get(_method(told))


def packed_as(config: Any) -> str | None:
    """In how many bits matrices of a checkpoint of this config are packed, in words; else None."""
    bits = packed_bits(config)
    if bits is not None:
        return f"{bits} bits ({COMPRESSED_TENSORS})"
    own = (getattr(config, OWN, None) or {}).get(QUANTISED)
    return f"{', '.join(sorted(own['bits']))} bits (moe_lab's own form)" if own else None


def stored_in_few_bits(config: Any) -> str | None:
    """In which way a checkpoint of this config is quantised, in words; None for plain weights."""
    return quantised_as(config) or packed_as(config)


@torch.no_grad()
def widen(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Let a model whose files are quantised compute in a wider dtype than theirs, in place.

    transformers leaves what FP8 files hold beside quantised matrices in the files' dtype.
    """
    for parameter in model.parameters():
        if torch.promote_types(parameter.dtype, dtype) != parameter.dtype and not parameter.is_meta:
            parameter.data = parameter.data.to(dtype)


def is_quantised(kind: str) -> bool:
    """Whether a tensor of this dtype, as safetensors call it, may be of quantised weights."""
    return kind.startswith(("F8", "F4", "U8", "I8"))


def result_dtype(config: Any) -> torch.dtype:
    """In which dtype dequantised weights are."""
    dtype = getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16


def _told(config: Any) -> dict[str, Any] | None:
    parts = (config, config.get_text_config(decoder=True))
    told = next((t for part in parts if (t := getattr(part, FIELDS[0], None))), None)
    return told if told is None or isinstance(told, dict) else told.to_dict()


def _method(told: Mapping[str, Any]) -> str:
    method = told.get("quant_method")
    method = getattr(method, "value", method)
    if method is None and any(told.get(f"load_in_{bits}bit") for bits in (4, 8)):
        return "bitsandbytes"
    return str(method)
