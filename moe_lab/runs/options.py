"""The composed options against what the code takes, before anything is made from them.

Every node with a `_target_` is compared with that function's or class's signature: a name that it
does not have and a value of the wrong kind are refused, with the name under which a user set it.
By hand: structured configs would declare each option a second time, beside that signature.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from pydoc import locate
from typing import Any

from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from moe_lab.runs.moved import refusal_of_option, refusal_of_target
from moe_lab.types import UserError

TOP = {"seed": int, "store": str, "run_dir": str, "resume": bool}
NODES = ("table",)  # beside the groups, checked as they are
PLURALS = {int: "whole numbers", float: "numbers", str: "text"}
HYDRA_KEYS = ("_target_", "_partial_", "_convert_", "_recursive_", "_args_")
WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
WORDS |= {type(None): "null", Sequence: "a list [a,b]", Mapping: "a mapping"}
NO_NAME = "Config group override must be a string"  # Hydra, of metric=true or metric=null
CONFIG_REFERENCE = re.compile(r"\$\{[^${}:]+\}")  # to one name, not made from other references
Node = Mapping[str, Any]


def check_request(options: Node, raw: Node, groups: Collection[str]) -> None:
    """Refuse unknown names and values of the wrong kind with a UserError.

    options: the composed config as plain data; raw: the same with its ${references} in place, from
    which a message takes the name that a user knows; groups: the config groups there are.
    """
    chosen = [group for group in groups if "/" not in group and "@" not in group]
    known = [*chosen, *NODES, *TOP]
    if unknown := [name for name in options if name not in known]:
        raise UserError(f"{unknown[0]} is no group and no option; there are {', '.join(known)}")
    for name, kind in TOP.items():
        require(name, options[name], kind)
    if options["seed"] < 0:
        raise UserError(f"seed={options['seed']}: it must be at least 0")
    for name, value in options.items():
        _check_node(value, raw[name], name, raw)


def target_of(path: str) -> Any:
    """What a `_target_` names; UserError where it does not exist, with its new path if it moved."""
    target: Any = locate(path)
    if target is None:
        raise refusal_of_target(path)
    return target


def require(name: str, value: Any, hint: Any) -> None:
    """Refuse a value that is not of the kind that `hint` says."""
    if value == "???":
        raise UserError(f"{name} must be given: {name}=<value>")
    if not _fits(value, hint):
        raise UserError(f"{name}={value}: it must be {_words(hint)}")


def refusal(error: BaseException | None) -> str | None:
    """What Hydra, OmegaConf or we refuse, in a few lines that say what exists; else None."""
    lines = []
    while error is not None:
        unknown = (ConfigKeyError, ConfigAttributeError)
        if isinstance(error, unknown) and error.parent_node is not None:
            there = [str(key) for key in error.parent_node if key not in ("hydra", "_target_")]
            group = str(error.full_key).partition(".")[0]
            names = there or [f"none yet: choose another {group}=<option> too"]
            lines = [str(refusal_of_option(str(error.full_key), names))]
        elif isinstance(error, UserError):
            lines = [str(error)]
        elif isinstance(error, OSError) and error.filename and not _from_hydra(error):
            lines.append(
                f"{error.filename}: {error.strerror}; choose another run_dir=<folder> "
                "(of a sweep: hydra.sweep.dir=<folder>)"
            )
        elif isinstance(error, ValueError) and str(error).startswith(NO_NAME):
            got = str(error).rpartition(" ")[2].replace("NoneType", "null")
            lines.append(
                f"a group was given {got}, and is chosen by a name, such as diagnose=full or "
                "eval=none; --help lists them"
            )
        elif isinstance(error, OmegaConfBaseException) or _from_hydra(error):
            message = str(error).partition("\nConfig search path")[0]
            lines.append(message.partition("\n    full_key")[0].strip())
        error = error.__cause__
    return "\n".join(lines) or None


def _from_hydra(error: BaseException) -> bool:
    return type(error).__module__ == "hydra.errors"  # only run.py imports hydra


def _check_node(node: Any, raw: Any, name: str, root: Node) -> None:
    name, raw = _where(raw, name, root)
    if isinstance(node, list):
        for index, value in enumerate(node):
            _check_node(value, raw[index], f"{name}[{index}]", root)
    if not isinstance(node, Mapping):
        return
    hints = _hints(node["_target_"]) if "_target_" in node else None
    for key, value in node.items():
        if hints is not None and key not in HYDRA_KEYS:
            inner, _ = _where(raw[key], f"{name}.{key}", root)
            if key not in hints:
                raise refusal_of_option(inner, list(hints))
            require(inner, value, hints[key])
        _check_node(value, raw[key], f"{name}.{key}", root)


def _where(raw: Any, name: str, root: Node) -> tuple[str, Any]:
    """Follow a ${reference} to the name and the raw node that it stands for."""
    while isinstance(raw, str) and CONFIG_REFERENCE.fullmatch(raw):
        name, raw = raw[2:-1], root
        for part in name.split("."):
            raw = raw[part]
    return name, raw


def _hints(path: str) -> dict[str, Any]:
    """The parameters of what a `_target_` names, with their annotations."""
    named = target_of(path)
    # A dataclass's fields may come from bases in other modules, whose names they are written in.
    plain_class = inspect.isclass(named) and not dataclasses.is_dataclass(named)
    hints = typing.get_type_hints(named.__init__ if plain_class else named)
    return {name: hints.get(name, Any) for name in inspect.signature(named).parameters}


def _kind(hint: Any) -> Any:
    """The hint without its element types, lists of all kinds being Sequence."""
    origin = typing.get_origin(hint) or hint
    if origin in (list, tuple, Sequence):
        return Sequence
    return Mapping if origin in (dict, Mapping) else origin


def _fits(value: Any, hint: Any) -> bool:
    kind, inner = _kind(hint), [part for part in typing.get_args(hint) if part is not Ellipsis]
    if kind in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in inner)
    if kind is Sequence:
        is_list = isinstance(value, list)
        return is_list and all(_fits(item, inner[0]) for item in value if inner)
    if kind is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind) if kind in WORDS else True


def _words(hint: Any) -> str:
    kind, inner = _kind(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return " or ".join(_words(part) for part in inner)
    if kind is Sequence and inner and _kind(inner[0]) in PLURALS:
        return f"a list [a,b] of {PLURALS[_kind(inner[0])]}"
    return WORDS.get(kind, str(hint))
