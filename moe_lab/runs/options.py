"""The composed options against what the code takes, before anything is made from them.

Every node with a `_target_` is compared with that function's or class's signature: a name that it
does not have, a value of the wrong kind and one out of range are refused, with the name under which
a user set it. What has no `_target_` is declared here. By hand: structured configs would declare
each option a second time, beside that signature.
"""

from __future__ import annotations

import inspect
import math
import re
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc import locate
from typing import Annotated, Any

from moe_lab import stopping
from moe_lab.option import Declared, Option, Plugin, declared_by, word_of
from moe_lab.runs.moved import refusal_of_option, refusal_of_target
from moe_lab.runs.quoting import for_shell, override
from moe_lab.types import UserError

REQUIRED = ("model", "calibration", "metric", "ratio", "grouping", "form", "condense", "method",
            "finetune", "quantize", "eval", "decoding", "measure", "diagnose", "trace", "compute",
            "track")  # fmt: skip
NODES = ("table",)  # beside the groups, checked as they are
PLURALS = {int: "whole numbers", float: "numbers", str: "text"}
HYDRA_KEYS = ("_target_", "_partial_", "_convert_", "_recursive_", "_args_")
WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
WORDS |= {type(None): "null", Sequence: "a list [a,b]", Mapping: "a mapping"}
CONFIG_REFERENCE = re.compile(r"\$\{[^${}:]+\}")  # to one name, not made from other references
# What check_early looks at.
EARLY = ("seed", "resume", "dry_run", "store", "run_dir", "objectives", "model", "table")
Node = Mapping[str, Any]


@dataclass(frozen=True)
class TopOptions:
    """The options that stand in no group."""

    seed: Annotated[int, Option("of all random choices", least=0, most=2**32 - 1)]
    resume: Annotated[bool, Option("leave out jobs whose folder holds a finished report")]
    dry_run: Annotated[bool, Option("tell what a run would cost, and make nothing")]
    store: Annotated[str, Option("folder of finished stages, shared by all runs")]
    run_dir: Annotated[str, Option("folder of a run's own files; a sweep's is hydra.sweep.dir")]
    objectives: Annotated[
        Sequence[str] | None, Option("keys of report.json whose figures a sweeper optimises")
    ]


@dataclass(frozen=True)
class ModelOptions:
    """Which model is compressed."""

    name: Annotated[str, Option("what reports and tables call it")]
    path: Annotated[str, Option("a folder, owner/name on the hub, or shipped:<name>")]
    revision: Annotated[str | None, Option("a branch, tag or commit on the hub")]
    dtype: Annotated[
        str,
        Option(
            "of the weights in memory; auto, as they are stored, or float32 where the device has "
            "no units for that"
        ),
    ]
    ignore_tensors: Annotated[
        Sequence[str],
        Option("patterns of tensors that its family does not know and that may go"),
    ] = ()
    licence: Annotated[str | None, Option("a note on its terms, as its page on the hub has it")] = (
        None
    )
    architecture: Annotated[
        Mapping[str, Any] | None,
        Option("its structure as published; a checkpoint with another one is warned of"),
    ] = None


WITHOUT_TARGET = {"model": ModelOptions}  # groups whose options nothing is made from


def check_request(options: Node, raw: Node, groups: Collection[str]) -> None:
    """Refuse unknown names, values of the wrong kind and values out of range with a UserError.

    options: the composed config as plain data; raw: the same with its ${references} in place, from
    which a message takes the name that a user knows; groups: the config groups there are.
    """
    check_names(options, groups)
    check_early(options)
    for name, value in options.items():
        _check_node(value, raw[name], name, raw)


def check_names(names: Iterable[str], groups: Iterable[str]) -> None:
    """Refuse what is neither a group nor an option that stands in none."""
    chosen = [group for group in groups if "/" not in group and "@" not in group]
    known = [*chosen, *NODES, *declared_by(TopOptions)]
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"{unknown[0]} is no group and no option; there are {', '.join(known)}")


def check_whole(names: Collection[str], groups: Iterable[str]) -> None:
    """Refuse a request of which a part was taken out, and what `check_names` does."""
    check_names(names, groups)
    needed = [*REQUIRED, *NODES, *declared_by(TopOptions)]
    if gone := [name for name in needed if name not in names]:
        raise UserError(
            f"{gone[0]} was taken out (~{gone[0]}), and a run needs it; {gone[0]}=none leaves a "
            "stage out where it may be"
        )


def check_early(options: Node) -> None:
    """Of that what needs no import of torch and the like, before a run leaves any file."""
    for name, declared in declared_by(TopOptions).items():
        _check_value(name, options[name], declared)
    node, declared_model = options.get("model") or {}, declared_by(ModelOptions)
    for name in sorted(declared_model, key="path".__ne__):  # first: a name may be made from it
        if name in node:
            _check_value(f"model.{name}", node[name], declared_model[name])
    for name, value in _needed(options):
        if not value.strip():
            raise UserError(f"{name}= is empty: it must be given, or left out for what conf/ has")
    folder = Path(options["run_dir"]).expanduser()
    above = (one for one in (folder, *folder.parents) if one.exists())
    if not (found := next(above)).is_dir():
        raise UserError(f"run_dir={folder}: {found} is a file: choose another run_dir=<folder>")
    expected = (options.get("table") or {}).get("expected")
    if isinstance(expected, str):
        from moe_lab.tables.expected import file_of_figures

        file_of_figures(Path(expected))


def _needed(options: Node) -> Iterator[tuple[str, str]]:
    """What is text and must say something."""
    yield from ((name, options[name]) for name in ("store", "run_dir"))
    model = options.get("model") or {}
    yield from ((f"model.{name}", model[name]) for name in ("path", "name") if name in model)


def check_group(name: str, options: Node, raw: Node) -> None:
    """Refuse what is wrong in one group, as `check_request` does in all."""
    _check_node(options[name], raw[name], name, raw)


def target_of(path: str) -> Any:
    """What a `_target_` names; UserError where it does not exist, with its new path if it moved."""
    if not isinstance(path, str):
        raise UserError(f"_target_: {path} is no name of a class or a function")
    with stopping.hold():  # torch does not survive a signal within its import
        target: Any = locate(path)
    stopping.check()
    if target is None:
        raise refusal_of_target(path)
    if not callable(target):
        raise UserError(f"_target_: {path or repr(path)} is no class and no function")
    return target


def require(name: str, value: Any, hint: Any) -> None:
    """Refuse a value that is not of the kind that `hint` says."""
    if value == "???":
        raise UserError(f"{name} must be given: {name}=<value>")
    if not _fits(value, hint):
        asked = f"{name}={word_of(value)}: it must be {kind_in_words(hint)}"
        if _is_text(hint) and value is not None and not isinstance(value, Mapping):
            asked += f"; as text it is {for_shell(override(name, word_of(value)))}"
        raise UserError(asked)


def _check_node(node: Any, raw: Any, name: str, root: Node) -> None:
    name, raw = _where(raw, name, root)
    if isinstance(node, list):
        for index, value in enumerate(node):
            _check_node(value, raw[index], f"{name}[{index}]", root)
    if not isinstance(node, Mapping):
        return
    declared = declared_for(node, name)
    for key, value in node.items():
        if declared is not None and key not in HYDRA_KEYS:
            inner, _ = _where(raw[key], f"{name}.{key}", root)
            if key not in declared:
                raise refusal_of_option(inner, list(declared))
            _check_value(inner, value, declared[key])
        _check_node(value, raw[key], f"{name}.{key}", root)


def declared_for(node: Node, name: str) -> dict[str, Declared] | None:
    """The options that the code behind a node takes; None where none stands behind it."""
    if "_target_" in node:
        return declared_by(target_of(node["_target_"]))
    return declared_by(WITHOUT_TARGET[name]) if name in WITHOUT_TARGET else None


def _check_value(name: str, value: Any, declared: Declared) -> None:
    require(name, value, declared.kind)
    declared.check(name, value)


def _where(raw: Any, name: str, root: Node) -> tuple[str, Any]:
    """Follow a ${reference} to the name and the raw node that it stands for."""
    while isinstance(raw, str) and CONFIG_REFERENCE.fullmatch(raw):
        name, raw = raw[2:-1], root
        for part in name.split("."):
            raw = raw[part]
    return name, raw


def _kind(hint: Any) -> Any:
    """The hint without its element types, lists of all kinds being Sequence."""
    origin = typing.get_origin(hint) or hint
    if origin is Annotated:
        return _kind(hint.__origin__)
    if origin in (list, tuple, Sequence):
        return Sequence
    return Mapping if origin in (dict, Mapping) else origin


def _fits(value: Any, hint: Any) -> bool:
    kind, inner = _kind(hint), _parts(hint)
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
    if _is_made(kind):
        return isinstance(value, Mapping)
    return isinstance(value, kind) if kind in WORDS else True


def _is_made(kind: Any) -> bool:
    """Whether a value of that kind is made of a node with a `_target_`."""
    return inspect.isclass(kind) and issubclass(kind, Plugin)


def _is_text(hint: Any) -> bool:
    """Whether text is all that a value may be, or null."""
    kinds = _parts(hint) if _kind(hint) in (typing.Union, types.UnionType) else [hint]
    return {_kind(part) for part in kinds} - {type(None)} == {str}


def _parts(hint: Any) -> list[Any]:
    """The hints inside one: of a list's items, or of a union's members."""
    hint = hint.__origin__ if typing.get_origin(hint) is Annotated else hint
    return [part for part in typing.get_args(hint) if part is not Ellipsis]


def kind_in_words(hint: Any) -> str:
    """What a value must be: "a whole number or null"."""
    kind, inner = _kind(hint), _parts(hint)
    if kind in (typing.Union, types.UnionType):
        return " or ".join(kind_in_words(part) for part in inner)
    if kind is Sequence and inner and _kind(inner[0]) in PLURALS:
        return f"a list [a,b] of {PLURALS[_kind(inner[0])]}"
    return WORDS.get(kind) or f"a {getattr(kind, '__name__', str(kind)).lower()}"
