"""Every option, from conf/ and the signatures of the code behind it.

`python docs/options.py` writes docs/options.md, and the most used values into the help of
conf/run.yaml. tests/test_options_page.py holds both to conf/ and the code.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from moe_lab.option import Declared, declared_by
from moe_lab.runs.option_help import declared_behind, help_line, option_words, options_of, shown
from moe_lab.runs.options import TopOptions, declared_for, kind_in_words, target_of

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
PAGE = ROOT / "docs" / "options.md"
HELP = CONF / "run.yaml"
LONGEST = 72  # characters of a default in a table

GROUPS = {
    "model": "which checkpoint is compressed",
    "calibration": "the text that statistics are collected on; the same sources are for tuning and "
    "held-out text",
    "method": "what becomes of experts and layers",
    "metric": "a score for each expert",
    "ratio": "how many experts stay in each layer",
    "grouping": "which experts become one, for method=merge",
    "form": "which factors, for method=factorize",
    "condense": "how layers are condensed, and how many layers other methods take",
    "finetune": "what trains behind the compression",
    "eval": "what is evaluated",
    "decoding": "how the text of tasks is decoded, of every variant alike",
    "measure": "what sizes and speeds are measured",
    "diagnose": "what the experts are looked at for",
    "trace": "which experts each token is sent to while the variants generate",
    "compute": "where it is computed, which no result depends on",
    "track": "where runs are tracked",
}
# The most used values, each with the options of which it is taken, for `python run.py --help`.
MOST_USED = {
    "ratio.ratio": "uniform",
    "ratio.of": "uniform",
    "ratio.target_gib": "uniform",
    "method.grouping": "merge",
    "method.replacement": "prune",
    "method.propagate": "prune",
    "condense.num_layers": "cd_moe",
    "condense.num_routed": "cd_moe",
    "condense.experts": "cd_moe",
    "condense.layers": "cd_moe",
    "finetune.top_k": "seer",
    "finetune.distillation": "experts",
    "finetune.teacher_top_k": "router_kd",
    "eval.top_k": "tiny",
    "eval.mirror": "tiny",
    "calibration.num_samples": "stdlib",
    "calibration.max_length": "stdlib",
    "calibration.group_by": "stdlib",
    "calibration.group": "stdlib",
    "compute.profile": "auto",
    "compute.cache_gib": "auto",
    "table.rows": "",
    "table.columns": "",
    "table.baseline": "",
    "seed": "",
    "store": "",
    "run_dir": "",
}
MARKS = "    # values: made by docs/options.py", "    # /values"


@dataclass(frozen=True)
class Row:
    """An option as a user sets it; value: its yaml's."""

    name: str
    declared: Declared | None
    value: Any

    @property
    def help(self) -> str:
        """What it is; "" where nothing says it."""
        option = self.declared.option if self.declared else None
        return option.help if option else ""

    def cells(self) -> list[str]:
        """Its line of a table: name, type, default, range, help."""
        option = self.declared.option if self.declared else None
        kind = kind_in_words(self.declared.kind) if self.declared else ""
        range_ = option.range() if option else ""
        return [f"`{self.name}`", kind, self._default(), range_, self.help]

    def _default(self) -> str:
        if self.value == "???":
            return "must be given"
        default = shown(self.value)
        if str(self.value).startswith("${"):
            return f"as `{default.removeprefix('as ')}`"
        return f"`{default}`" if len(default) <= LONGEST else f"`{default[:LONGEST]}…`"


@cache
def choice(group: str, name: str) -> dict[str, Any]:
    """A file of conf/ as it is written."""
    text = (CONF / group / f"{name}.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text) or {}


def choices(group: str) -> list[str]:
    """The options of a group."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def base_of(group: str, name: str) -> str | None:
    """The sibling that an option begins with."""
    defaults = choice(group, name).get("defaults", [])
    return next((one for one in defaults if isinstance(one, str) and one != "_self_"), None)


def placed(group: str, name: str) -> dict[str, tuple[str, str]]:
    """By place, the group and option that are put there: phases.lm.data, calibration, stdlib."""
    found = {}
    for one in choice(group, name).get("defaults", []):
        for key, chosen in one.items() if isinstance(one, dict) else ():
            if key.startswith("override "):  # of another group, and no part of this node
                continue
            other, _, place = key.lstrip("/").partition("@")
            found[place] = (other, chosen)
    return found


def composed(group: str, name: str) -> dict[str, Any]:
    """The option's node as Hydra puts it together, with references as they are written."""
    base = base_of(group, name)
    node = composed(group, base) if base else {}
    for place, chosen in placed(group, name).items():
        inner: Any = composed(*chosen)
        for part in reversed(place.split(".")):
            inner = {part: inner}
        node = _merged(node, inner)
    own = {key: value for key, value in choice(group, name).items() if key != "defaults"}
    return _merged(node, own)


def _merged(node: Any, other: Any) -> Any:
    if not (isinstance(node, Mapping) and isinstance(other, Mapping)):
        return other
    return dict(node) | {key: _merged(node.get(key), value) for key, value in other.items()}


def rows_of(group: str, name: str) -> list[Row]:
    """The options that an option's file sets, in the order of the composed node."""
    own, places = choice(group, name), placed(group, name)
    rows = []
    for full, declared, value in options_of(composed(group, name), group):
        place = full.partition(".")[2]
        declared = declared or declared_behind(full, _nodes())
        if place in places:
            other, chosen = places[place]
            rows.append(Row(f"{other}@{full}", declared, chosen))
        if _is_set(own, place.split(".")):
            rows += _set_inside(Row(full, declared, value), own, place)
    return rows


def _set_inside(row: Row, own: Any, place: str) -> Iterator[Row]:
    """An option; where it is a source that was put there, what is set of it."""
    for part in place.split("."):
        own = own[part]
    if not (isinstance(row.value, Mapping) and "_target_" in row.value):
        yield row
        return
    declared = declared_for(row.value, row.name) or {}
    for key, value in own.items():
        if key != "_target_":
            yield Row(f"{row.name}.{key}", declared.get(key), value)


def _is_set(own: Any, parts: list[str]) -> bool:
    for part in parts:
        if not isinstance(own, Mapping) or part not in own:
            return False
        own = own[part]
    return True


@cache
def _nodes() -> tuple[dict[str, Any], ...]:
    return tuple(composed(group, name) for group in GROUPS for name in choices(group))


def top_rows() -> list[Row]:
    """The options that stand in no group."""
    node = yaml.safe_load(HELP.read_text(encoding="utf-8"))
    rows = [Row(name, one, node[name]) for name, one in declared_by(TopOptions).items()]
    return rows + [Row(*one) for one in options_of(node["table"], "table")]


def about(group: str, name: str) -> str:
    """What an option is: the head of its file, else the first sentence of its code."""
    head = []
    for line in (CONF / group / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        head.append(line.lstrip("# "))
    target = choice(group, name).get("_target_")
    if not head and target:
        head = [(target_of(target).__doc__ or "").partition("\n\n")[0]]
    return " ".join(" ".join(head).split())


# --------------------------------------------------------------------------- the page

INTRO = """# Options

Made by `python docs/options.py` from `conf/` and the signatures of the code behind it. An option of
a group is chosen with `group=option`, a value is set with its name: `python run.py finetune=seer
finetune.top_k=2`. What a yaml does not have is added with `+`. `python run.py finetune=seer --help`
tells the options of what is chosen, `python run.py finetune=seer --cfg job` all values as they are
put together. The same is refused before a job begins that is out of range here.
"""
HEAD = ["option", "type", "default", "range", "what it is"]


def page() -> str:
    """docs/options.md."""
    links = [f"- [{group}](#{group}): {words}" for group, words in GROUPS.items()]
    lines = [INTRO, *links, "- [without a group](#without-a-group)", ""]
    for group, words in GROUPS.items():
        lines += [f"## {group}", "", f"{words[0].upper()}{words[1:]}.", ""]
        for name in choices(group):
            lines += _section(group, name)
    lines += ["## without a group", "", *_table(top_rows())]
    return "\n".join(lines).rstrip() + "\n"


def _section(group: str, name: str) -> list[str]:
    base = base_of(group, name)
    words = [_escaped(about(group, name)) or "Left out." * (name == "none")]
    words += [f"As [{group}={base}](#{group}{base}), but for:"] if base else []
    more = [f"`+{group}.{key}`" for key in _unset(group, name)]
    words = list(filter(None, words))
    lines = [f"### {group}={name}", "", *(line for one in words for line in (one, ""))]
    lines += _table(rows_of(group, name))
    return lines + ([f"With `+`: {', '.join(more)}.", ""] if more and not base else [])


def _unset(group: str, name: str) -> list[str]:
    """The options that the code takes and the file does not have."""
    node = composed(group, name)
    declared = declared_for(node, group) or {}
    partial = node.get("_partial_", False)  # then what it lacks is given by us
    return [key for key in declared if key not in node and not partial]


def _table(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    cells = [HEAD, ["---"] * len(HEAD), *([_escaped(cell) for cell in row.cells()] for row in rows)]
    return [*("| " + " | ".join(line) + " |" for line in cells), ""]


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    parts = re.split(r"(`[^`]*`)", text.replace("|", r"\|"))
    return "".join(part if part[:1] == "`" else part.replace("<", r"\<") for part in parts)


# --------------------------------------------------------------------------- the help


def most_used() -> str:
    """The footer of `python run.py --help`, as YAML: the values of MOST_USED."""
    lines = ["Most used values:"]
    tops = {row.name: row for row in top_rows()}
    for name, of in MOST_USED.items():
        group = name.partition(".")[0]
        rows = {row.name: row for row in rows_of(group, of)} if of else tops
        words = option_words(rows[name].declared)
        lines.append(help_line(name, f"{words}{_where(group, name) if of else ''}"))
    lines.append("All there are: docs/options.md")
    return "    footer: |\n" + textwrap.indent("\n".join(lines), " " * 6) + "\n"


def _where(group: str, name: str) -> str:
    """With which options of its group a value goes; "" with every one."""
    every = [one for one in choices(group) if one != "none"]
    there = [one for one in every if name.partition(".")[2] in composed(group, one)]
    return f" [{group}={'|'.join(there)}]" if there != every else ""


def with_help(text: str) -> str:
    """conf/run.yaml with the values between its marks made anew."""
    start, rest = text.split(MARKS[0])
    _, end = rest.split(MARKS[1])
    return f"{start}{MARKS[0]}\n{most_used()}{MARKS[1]}{end}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    HELP.write_text(with_help(HELP.read_text(encoding="utf-8")), encoding="utf-8")
