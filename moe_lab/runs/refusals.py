"""What Hydra, OmegaConf, the disk and we refuse, as a message of a few lines without traceback."""

from __future__ import annotations

import errno
import re
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
)

from moe_lab.runs.moved import refusal_of_option
from moe_lab.runs.quoting import as_written, for_shell, quoted
from moe_lab.types import UserError

USER_MISTAKE = 2  # the exit code
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
NO_NAME = "Config group override must be a string"  # Hydra, of metric=true or metric=null
AMBIGUOUS = re.compile(r"Ambiguous value for argument '(.*?)'\n1\. ", re.DOTALL)
PLUGINS = r"'hydra/(?:launcher|sweeper)/(joblib|ray|submitit|optuna)\w*'"
NO_PLUGIN = re.compile(rf"Could not (?:find|load) {PLUGINS}")
# Of pyproject.toml, by plugin.
EXTRAS = {"joblib": "joblib", "ray": "ray", "submitit": "slurm", "optuna": "optuna"}
OTHER_FOLDER = "choose another run_dir=<folder> (of a sweep: hydra.sweep.dir=<folder>)"


def refusal(error: BaseException | None) -> str | None:
    """What is refused, and what exists in its place; None where the error is none of a user's."""
    lines: list[str] = []
    while error is not None:
        if isinstance(error, (ConfigKeyError, ConfigAttributeError)) and (
            error.parent_node is not None
        ):
            lines = [_unknown_key(error)]
        elif isinstance(error, UserError):
            lines = [str(error)]
        elif told := _of_the_disk(error) or _of_a_config(error):
            lines.append(told)
        error = error.__cause__
    return "\n".join(lines) or None


def check_words(words: Iterable[str]) -> None:
    """Refuse words of a command that are no text: they could be written into no file."""
    for word in words:
        if (odd := word.encode(errors="replace").decode()) != word:
            raise UserError(f"{odd} has bytes that are no UTF-8: rename what it names")


def _of_the_disk(error: BaseException) -> str | None:
    if not isinstance(error, OSError) or _from_hydra(error):
        return None
    if error.filename:
        return f"{error.filename}: {error.strerror}; {OTHER_FOLDER}"
    if error.errno in NO_ROOM:
        return f"a file of the run cannot be written: {error.strerror}; {OTHER_FOLDER}"
    return None


def _of_a_config(error: BaseException) -> str | None:
    """Of what was composed, and of what it was composed from."""
    message = str(error).partition("\nConfig search path")[0]
    if _from_hydra(error) and (missing := NO_PLUGIN.search(message)):
        plugin = missing[1]
        return f"{plugin} is not installed here: pip install 'moe_lab[{EXTRAS[plugin]}]'"
    if isinstance(error, yaml.YAMLError):
        return f"a yaml file is broken: {' '.join(message.split())}"
    if isinstance(error, UnicodeDecodeError) and (name := _loading(error)):
        return f"{name} is no UTF-8, which a yaml file is: {message}"
    if isinstance(error, ValueError) and message.startswith(NO_NAME):
        got = message.rpartition(" ")[2].replace("NoneType", "null")
        return (
            f"a group was given {got}, and is chosen by a name, such as diagnose=full or "
            "eval=none; --help lists them"
        )
    if isinstance(error, (TypeError, AttributeError)) and _within_hydra(error):
        return (
            f"Hydra cannot compose this ({message}): a group is chosen by a name, such as "
            "eval=none, not by a list"
        )
    if isinstance(error, InterpolationResolutionError):
        return _reference(error)
    if type(error).__name__ == "OverrideParseException":
        return _unreadable(str(getattr(error, "override", "")), message)
    if ambiguous := AMBIGUOUS.match(message):
        return _several(ambiguous[1])
    if isinstance(error, OmegaConfBaseException) or _from_hydra(error):
        return message.partition("\n    full_key")[0].strip()
    if isinstance(error, ValueError) and message.startswith(("Only one of", "The --resolve")):
        return message  # of Hydra's own flags
    return None


def _unreadable(word: str, message: str) -> str:
    if "=" not in word:
        return (
            f"{word!r} is no option, which is said as key=value, such as ratio.ratio=0.5, or as "
            "group=option, such as method=prune; --help lists them"
        )
    way = as_written(word)
    said = f"Hydra cannot read {word}"
    if way is None:
        return f"{said}: {message.splitlines()[0]}"
    return f"{said}: quote the value for Hydra, and all of it for the shell: {for_shell(way)}"


def _several(word: str) -> str:
    key, _, value = word.partition("=")
    text = as_written(word)
    whole = f"; as one text it is {for_shell(text)}" if text else ""
    return (
        f"{word} is several values: for a sweep over them add -m; as a list it is "
        f"{for_shell(f'{key}=[{value}]')}{whole}"
    )


def _reference(error: InterpolationResolutionError) -> str:
    """A ${reference} that leads nowhere, with the option in which it stands."""
    message = str(error).partition("\n    full_key")[0].strip()
    key = str(error.full_key or "")
    parent: Any = error.parent_node
    try:
        value = parent._get_node(error.key)._value() if parent is not None else None
    except (AttributeError, TypeError, KeyError):
        value = None
    if not key or key.startswith("hydra.") or not isinstance(value, str):
        return message
    text = for_shell(f"{key}={quoted(value)}")
    return f"{key}={value}: {message} (${{…}} stands for another option); as text it is {text}"


def _unknown_key(error: ConfigKeyError | ConfigAttributeError) -> str:
    there = [str(key) for key in error.parent_node if key not in ("hydra", "_target_")]
    group = str(error.full_key).partition(".")[0]
    names = there or [f"none yet: choose another {group}=<option> too"]
    return str(refusal_of_option(str(error.full_key), names))


def _from_hydra(error: BaseException) -> bool:
    return type(error).__module__ == "hydra.errors"  # only run.py imports hydra


def _within_hydra(error: BaseException) -> bool:
    """Whether it came up in Hydra's own composing."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and "/hydra/_internal/" in Path(frames[-1].filename).as_posix()


def _loading(error: BaseException) -> str | None:
    """The file of a config that Hydra was reading when it came up."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == "load_config" and "config_path" in frame.f_locals:
            return str(frame.f_locals["config_path"])
    return None
