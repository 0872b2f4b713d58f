"""A config.json of others, before anything is built from it: object, names, numbers and sizes.

transformers checks the type of each field that a family declares, and builds whatever fits; sizes
that no file bears out and numbers that are none go through, and a large count is built for hours.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from moe_lab.models.layers import COUNT_FIELDS
from moe_lab.models.own_config import read_config
from moe_lab.models.quantised import check_quantisation
from moe_lab.models.stored import Stored
from moe_lab.types import UserError

NAME = "config.json"
TEXT_PARTS = ("text_config", "thinker_config", "llm_config", "language_config")
# Fields that choose the code that computes: a request's or transformers' own, never a checkpoint's.
IMPLEMENTATION = re.compile(r"^_?(attn|experts)_implementation(_internal)?$")
CODE = ("fusion_config", "kernel_config", "use_kernels", "allow_all_kernels")
WEIGHTS = "transformers_weights"

_LAYERS = re.compile(r"^(num|n)_(\w+_)?(layers?|blocks)$|^(num|n)_layer$|^depth$")
_COUNTS = re.compile(
    r"^(num|n)_(\w+_)?(experts?|heads?|groups?)$|^topk_group$|experts_per_tok$|"
    r"^zero_expert_num$"
)
_POSITIVE = re.compile(
    r"^(hidden_size|d_model|vocab_size|num_hidden_layers|num_attention_heads|"
    r"num_experts_per_tok|n_group|topk_group|max_position_embeddings|n_positions|decoder_sparse_step|"
    r"chunk_size|attention_chunk_size)$"
)
_SMALL = re.compile(r"(^|_)(eps|epsilon)$")
_ABOVE_0 = re.compile(r"(^|\.)(rope_theta|rope_(scaling|parameters)\.(\w+\.)?(rope_theta|factor))$")
_SIZES = re.compile(r"(hidden_size|intermediate_size|_dim|_rank)$")
_SHARES = re.compile(r"(^|_)(dropout|dropout_prob|pdrop)$")
_ROTATED = re.compile(r"^(partial_rotary_factor|rotary_pct)$")
_PLACES = re.compile(r"^(mlp_only_layers|moe_layers|full_attn_idxs|dense_layers)$")
_BOUNDLESS = re.compile(r"limit|clip|clamp|max|min")  # what may be infinite
_TOPK_METHODS = ("greedy", "group_limited_greedy", None)  # of deepseek_v2, at its first token
_MOST_POSITIONS = 10**9  # positions


def config_values(folder: Path) -> dict[str, Any]:
    """The family's values of a folder's config.json; UserError where it holds none."""
    path = folder / NAME
    try:
        values = read_config(path)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(values.get("model_type"), str) or not values["model_type"]:
        told = f"model_type={values['model_type']!r}" if "model_type" in values else "no model_type"
        raise UserError(
            f"{path} has {told}: it must name the family, as transformers calls it, such as "
            '"model_type": "mixtral"'
        )
    return values


def check_values(path: Path, values: Mapping[str, Any], stored: Sequence[Stored]) -> None:
    """Refuse what a config.json says and no checkpoint of these tensors can mean.

    Raises UserError with the field and its value.
    """
    for name, value in _flat(values):
        _check_code(path, name, value)
        _check_number(path, name, value)
    check_quantisation(path, values)
    _check_dtypes(path, values)
    _check_names(path, values)
    text = text_part(values)
    most = {"tensors": len(stored), "values": 2 * sum(one.num_bytes for one in stored)}
    for name, value in _flat(values):
        _check_count(path, name, value, most)
    for name, value in text.items():
        if name in COUNT_FIELDS and value == 0:
            raise _wrong(path, name, value, "a model without experts is none that moe_lab edits")
        if name == "sliding_window" and _is_number(value) and value < 0:
            raise _wrong(path, name, value, "it cannot be negative; null is none")
        if _POSITIVE.search(name) and value is not None and _is_number(value) and value <= 0:
            raise _wrong(path, name, value, "it must be above 0")
    _check_groups(path, text)
    _check_positions(path, text)
    _check_places(path, text)


def text_part(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that says its text model: all of it where it is no wrapper's."""
    inner = next((values[name] for name in TEXT_PARTS if isinstance(values.get(name), dict)), None)
    return values if inner is None else text_part(inner)


def value_shown(value: Any) -> str:
    """A config's value in a message: not all of a long one."""
    shown = repr(value)
    return shown if len(shown) < 80 else f"{shown[:60]}..."


def unheeded(values: Mapping[str, Any]) -> list[str]:
    """The fields of a config that would choose code, and are not followed: "name=value".

    But for what moe_lab itself asks for, and where it is needed finds by itself: eager experts.
    """
    found = []
    for name, value in _flat(values):
        last = name.rpartition(".")[2]
        if (name, value) == ("experts_implementation", "eager"):
            continue
        chooses = bool(IMPLEMENTATION.search(last)) and not last.endswith("_internal")
        if (chooses and value is not None) or any(
            part in (*CODE, "auto_map") for part in name.split(".")
        ):
            found.append(f"{name}={value}")
    return found


def without_choices(config: Any) -> Any:
    """The config, as an object, without what it says of the code that computes; in place.

    But for auto_map: it is never followed, and comes along for whoever trusts it.
    """
    config._attn_implementation = None  # the setters reach parts, too
    config._experts_implementation = None
    for name in CODE:
        if name in vars(config):
            delattr(config, name)
    return config


def _check_code(path: Path, name: str, value: Any) -> None:
    parts = name.split(".")
    if any(IMPLEMENTATION.search(part) for part in parts):
        if isinstance(value, str) and ("/" in value or ":" in value):
            raise _wrong(
                path, name, value,
                "it names a kernel on the hub, code that a checkpoint cannot ask for. Remove the "
                "field: moe_lab computes with what is installed",
            )  # fmt: skip
        if value is not None and not isinstance(value, str):
            raise _wrong(path, name, value, "it must be text or null; remove the field")
    if parts[-1] == WEIGHTS and value is not None:
        raise _wrong(
            path, name, value,
            "moe_lab reads model.safetensors, or what its index names, and nothing else that a "
            "config names. Remove the field and give the file that name",
        )  # fmt: skip


def _check_number(path: Path, name: str, value: Any) -> None:
    last = name.rpartition(".")[2]
    if isinstance(value, str) and value in ("NaN", "Infinity", "-Infinity"):
        value = float(value.replace("Infinity", "inf"))  # as transformers writes them since 5
        last = name.split(".")[-2] if last == "__float__" else last
    if isinstance(value, float) and math.isnan(value):
        raise _wrong(path, name, value, "it is no number")
    if isinstance(value, float) and math.isinf(value):
        if not _BOUNDLESS.search(name):
            raise _wrong(path, name, value, "it must be finite")
        return
    if isinstance(value, int) and abs(value) >= 2**63:
        raise _wrong(path, name, value, "no size or count is so large")
    rules: tuple[tuple[re.Pattern[str], Callable[[float], bool], str], ...] = (
        (_SMALL, lambda number: 0 <= number < 1, "it must be a number from 0 to below 1"),
        (_ABOVE_0, lambda number: number > 0, "it must be a number above 0"),
        (_SIZES, lambda number: number >= 0, "it must be a number from 0 on"),
        (_ROTATED, lambda number: 0 < number <= 1, "it must be a number above 0, up to 1"),
        (_SHARES, lambda number: 0 <= number <= 1, "it must be a number from 0 to 1"),
    )
    for names, fits, told in rules:
        possible = value is None or (_is_number(value) and fits(value))
        if names.search(name if names is _ABOVE_0 else last) and not possible:
            raise _wrong(path, name, value, told)


def _check_count(path: Path, name: str, value: Any, most: Mapping[str, int]) -> None:
    last = name.rpartition(".")[2]
    kind = "tensors" if _LAYERS.search(last) else "values" if _COUNTS.search(last) else None
    if kind is None or value is None:
        return
    if type(value) is not int:
        raise _wrong(path, name, value, "it must be a whole number")
    if value < 0:
        raise _wrong(path, name, value, "it cannot be negative")
    if value > most[kind]:
        raise _wrong(path, name, value, f"its weight files hold {most[kind]} {kind} in all")


def _check_dtypes(path: Path, values: Mapping[str, Any]) -> None:
    for name, value in _items(values):
        if name.rpartition(".")[2] not in ("dtype", "torch_dtype") or value in (None, "auto"):
            continue
        known = isinstance(value, str) and getattr(torch, value.removeprefix("torch."), None)
        if not isinstance(known, torch.dtype) or not known.is_floating_point:
            raise _wrong(
                path, name, value, "it must be float32, bfloat16, float16, float64 or null"
            )


def _check_names(path: Path, values: Mapping[str, Any]) -> None:
    told = values.get("architectures")
    if told is not None and not (isinstance(told, list) and all(isinstance(t, str) for t in told)):
        raise _wrong(path, "architectures", told, "it must be a list of names of classes, or null")
    text = text_part(values)
    routing = text.get("topk_method")
    if text.get("model_type") == "deepseek_v2" and routing not in _TOPK_METHODS:
        known = ", ".join(map(str, _TOPK_METHODS[:-1]))
        raise _wrong(path, "topk_method", routing, f"transformers knows {known}")
    for name in ("is_encoder_decoder", "tie_word_embeddings"):
        if not isinstance(values.get(name), (bool, type(None))):
            raise _wrong(path, name, values[name], "it must be true or false")
    objects = (*TEXT_PARTS, "vision_config", "audio_config", "rope_scaling", "rope_parameters")
    for name, value in _items(values):
        if name.rpartition(".")[2] in objects and value is not None:
            raise _wrong(path, name, value, "it must be an object or null")


def _check_groups(path: Path, text: Mapping[str, Any]) -> None:
    """A router uses no more groups of experts than there are, also where there is one."""
    groups: Any = text.get("n_group")
    used: Any = text.get("topk_group")
    if _is_number(groups) and _is_number(used) and used > groups:
        raise _wrong(path, "topk_group", used, f"the router has {groups} groups (n_group)")


def _check_positions(path: Path, text: Mapping[str, Any]) -> None:
    longest: Any = text.get("max_position_embeddings")
    size = text.get("vocab_size")
    if _is_number(longest) and longest > _MOST_POSITIONS:
        raise _wrong(path, "max_position_embeddings", longest, "no model has so many positions")
    pad = text.get("pad_token_id")
    if isinstance(pad, int) and isinstance(size, int) and pad >= size:
        raise _wrong(path, "pad_token_id", pad, f"its vocabulary has {size} tokens (vocab_size)")


def _check_places(path: Path, text: Mapping[str, Any]) -> None:
    """Lists of decoder layers, by number, name layers that there are."""
    number = text.get("num_hidden_layers")
    if not isinstance(number, int):
        return
    behind = sum(
        value for name, value in text.items()
        if re.search(r"nextn|mtp", name) and isinstance(value, int)
    )  # fmt: skip
    for name, value in text.items():
        if not _PLACES.search(name) or value is None:
            continue
        numbers = isinstance(value, list) and all(type(one) is int for one in value)
        if not numbers or not all(0 <= one < number + behind for one in value):
            told = f"it must be a list of numbers of layers, from 0 to {number - 1}"
            raise _wrong(path, name, value, told)


def _items(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """All values of a config that are no objects, by dotted names."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _items(value, f"{above}{name}.")
        else:
            yield above + name, value


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The same, with each value of a list by itself."""
    for name, value in _items(values):
        if isinstance(value, list):
            yield from ((name, one) for one in _leaves(value))
        else:
            yield name, value


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, dict)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _leaves(one)
    else:
        yield value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _wrong(path: Path, name: str, value: Any, told: str) -> UserError:
    return UserError(f"{path}: {name}={value_shown(value)}: {told}")
