"""Configs and models built by transformers from what others wrote, and whose fault it is if not.

What transformers raises while it builds from a checkpoint's own values is told with the fields that
the failing line reads. What moe_lab's own code raises passes through: that is an error of ours.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedModel

from moe_lab.files import PACKAGE
from moe_lab.models.adapters.base import check_supported
from moe_lab.models.config_file import NAME, config_values, value_shown, without_choices
from moe_lab.models.layers import COUNT_FIELDS
from moe_lab.models.opening import empty_model
from moe_lab.models.own_config import MODEL_TYPE
from moe_lab.models.quantised import dequantising
from moe_lab.types import UserError

LOCAL = {"local_files_only": True, "trust_remote_code": False}  # no network, no foreign code
_FIELD = re.compile(r"\b(?:config|self|text_config|vision_config)\.(\w+)")
_QUOTED = re.compile(r"[Ff]ield '(\w+)'|`(\w+)`|\b(\w+)=")
_LONGEST = 400  # characters of a message of another library's


def built_config(folder: Path) -> Any:
    """The config of a checkpoint, as transformers reads it; UserError where it does not.

    It says nothing of the code that computes, and has its weights dequantised.
    """
    values = config_values(folder)
    _check_known(folder, values)
    with blamed_on(folder / NAME, values):
        config = AutoConfig.from_pretrained(folder, **LOCAL)
        return dequantising(without_choices(config))


def built_model(folder: Path, config: Any) -> PreTrainedModel:
    """The model of a checkpoint without weights; UserError where its config describes none."""
    check_supported(config.model_type)
    with blamed_on(folder / NAME, config_values(folder)):
        return empty_model(config)


@contextmanager
def blamed_on(path: Path, values: dict[str, Any]) -> Iterator[None]:
    """Tell what transformers or torch raise inside as what is wrong with this config.json."""
    try:
        yield
    except UserError as error:
        raise error if str(path.parent) in str(error) else UserError(f"{path}: {error}") from error
    except Exception as error:
        if _is_ours(error):
            raise
        raise UserError(f"{path}: {_told(error, values)}") from error


def _check_known(folder: Path, values: dict[str, Any]) -> None:
    model_type = values["model_type"]
    if model_type in CONFIG_MAPPING or model_type == MODEL_TYPE:
        return
    own = "; the code beside it is never run here" if "auto_map" in values else ""
    raise UserError(
        f"{folder / NAME} (model_type) is of the family {model_type!r}, which this version of "
        f"transformers does not know{own}. A newer one may; `python -m moe_lab.families` lists the "
        "families whose experts moe_lab edits"
    )


def _is_ours(error: BaseException) -> bool:
    """Whether the line that raised stands in moe_lab."""
    frames = traceback.extract_tb(error.__traceback__)
    return Path(frames[-1].filename).is_relative_to(PACKAGE)


def _told(error: Exception, values: dict[str, Any]) -> str:
    """An error in one line, after the fields that it is about."""
    cause: BaseException = error
    while type(cause).__name__.startswith("StrictDataclass") and cause.__cause__:
        cause = cause.__cause__
    message = " ".join(str(cause).split())[:_LONGEST]
    fields = dict.fromkeys([*_named_in(str(error), values), *_read_by(error, values)])
    told = ", ".join(f"{name}={value_shown(value)}" for name, value in _values_of(fields, values))
    kind = "" if isinstance(cause, (ValueError, TypeError)) else f"{type(cause).__name__}: "
    return f"{f'{told}: ' if told else ''}no model can be built of this: {kind}{message}"


def _named_in(message: str, values: dict[str, Any]) -> list[str]:
    """Fields that a message names, or whose value it is."""
    groups = (group for match in _QUOTED.finditer(message) for group in match.groups())
    named = [group for group in groups if group and _holds(values, group)]
    return named or [
        name
        for name, value in _all_values(values)
        if isinstance(value, str) and value and message.strip("'\"") == value
    ]


def _read_by(error: Exception, values: dict[str, Any]) -> list[str]:
    """Fields that the failing line reads, or else the innermost line that reads any."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if Path(frame.filename).is_relative_to(PACKAGE):
            continue
        read = _FIELD.findall(frame.line or "")
        if set(read) & set(COUNT_FIELDS):  # by whichever name the family has its number of experts
            read = [*COUNT_FIELDS, *read]
        names = [name for name in read if _holds(values, name)]
        if names:
            return names
    return []


def _all_values(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        yield name, value
        if isinstance(value, dict):
            yield from _all_values(value)


def _holds(values: dict[str, Any], name: str) -> bool:
    return any(name == other for other, _ in _all_values(values))


def _values_of(names: dict[str, None], values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name in list(names)[:3]:
        yield name, next(value for other, value in _all_values(values) if other == name)
