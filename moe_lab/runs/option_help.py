"""Options in words, for `python run.py --help` and docs/options.md.

As light as the help itself: code is imported only where a choice on the command line asks for it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from moe_lab.option import Declared, declared_by, word_of
from moe_lab.runs.options import HYDRA_KEYS, Node, declared_for, kind_in_words, target_of

NAME_WIDTH, WIDTH = 24, 112
HEAD = "Options of what was chosen here, and their values:"


def options_of(node: Node, name: str) -> Iterator[tuple[str, Declared | None, Any]]:
    """Each option of a group's node: its name, what declares it, its value.

    A recipe's phases are looked into; sources of text inside them have options of their own.
    """
    declared = declared_for(node, name) or {}
    for key, value in node.items():
        if key in HYDRA_KEYS:
            continue
        parts = value if isinstance(value, Mapping) and "_target_" not in value else {}
        if not any(isinstance(part, Mapping) and "_target_" in part for part in parts.values()):
            yield f"{name}.{key}", declared.get(key), value
            continue
        for inner, part in parts.items():
            if part is None:
                yield f"{name}.{key}.{inner}", declared.get(key), None
            else:
                yield from options_of(part, f"{name}.{key}.{inner}")


def declared_behind(name: str, nodes: Iterable[Any]) -> Declared | None:
    """What declares an option that only other nodes refer to, as ${condense.num_layers}."""
    for node in nodes:
        for key, value in node.items() if isinstance(node, Mapping) and "_target_" in node else ():
            if value == f"${{{name}}}":
                return declared_by(target_of(node["_target_"]))[key]
    return None


def option_words(declared: Declared | None, *limits: str) -> str:
    """An option's help, and in brackets what limits it and its range; without help its type."""
    option = declared.option if declared else None
    if option is None:
        return ", ".join(limits) or (kind_in_words(declared.kind) if declared else "")
    within = ", ".join(filter(None, [*limits, option.range()]))
    return f"{option.help} ({within})" if within else option.help


def help_line(name: str, words: str) -> str:
    """What is said of an option, wrapped behind its name."""
    head = f"  {name:{NAME_WIDTH}} " if len(name) < NAME_WIDTH else f"  {name}  "
    lines = textwrap.fill(
        words, WIDTH, initial_indent=head, subsequent_indent=" " * (NAME_WIDTH + 3),
        break_on_hyphens=False, break_long_words=False,
    )  # fmt: skip
    return (lines or head).rstrip()


def chosen_options(*, _root_: DictConfig) -> str:
    """The options of the group options that a command line names, for the help; "" without any."""
    plain: Any = OmegaConf.to_container(_root_, resolve=False)
    words = [word.lstrip("+~").partition("=")[0] for word in plain["hydra"]["overrides"]["task"]]
    lines = []
    for group in dict.fromkeys(word for word in words if isinstance(plain.get(word), Mapping)):
        for name, declared, value in options_of(plain[group], group):
            declared = declared or declared_behind(name, plain.values())
            kinds = [kind_in_words(declared.kind)] if declared else []
            lines.append(help_line(name, f"{option_words(declared, *kinds)}: {shown(value)}"))
    return "\n".join(["", HEAD, *lines, ""]).replace("$", "$$") if lines else ""


def shown(value: Any) -> str:
    """A value as the help and the docs show it: of a mapping its names, of a reference the name."""
    if isinstance(value, Mapping):
        target = str(value.get("_target_", "")).rpartition(".")[2]
        return target or ", ".join(map(str, value)) or "{}"
    text = word_of(value).replace("\n", "\\n")
    if text.startswith("${") and text.endswith("}"):
        return f"as {text[2:-1]}"
    return text or '""'
