"""What lies in a run's folder, read for its page: plan, usage, curve, log, commands."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from moe_lab import store
from moe_lab.files import DIAGNOSIS, HYDRA
from moe_lab.integrity import PARTIAL
from moe_lab.models.edits.base import Edit
from moe_lab.models.edits.chain import Chain
from moe_lab.models.edits.plan import chains_of, read_edit

CONFIG_FOLDER = r"^    - path: (.+)\n +schema: file\n +provider: command-line$"
LOG_LINES, LOG_BYTES = 300, 100_000
LISTED = (HYDRA, DIAGNOSIS)  # the folders of a run whose files are ours
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_plan(text: str | None) -> tuple[dict[str, Any] | None, dict[int, list[float]]]:
    """A plan to four digits, and its scores by layer: runs often differ in the plan alone.

    Its edits (`layers` and `searched`) come as `_row` has them, in words that no kind is told by.
    """
    try:
        plan = json.loads(text, parse_float=_short, parse_constant=_nothing) if text else None
    except ValueError:  # killed while it was written
        return None, {}
    if not isinstance(plan, dict) or "layers" not in plan:
        return None, {}
    scores = {}
    for key in ("searched", "layers"):
        chains = chains_of(read_edit(values) for values in plan.get(key, ()))
        plan[key] = [row for chain in chains for row in _rows(chain)]
        scores = {chain.index: chain.expert_scores for chain in chains}
    return plan, {index: list(values) for index, values in scores.items() if len(values) > 1}


def _rows(chain: Chain) -> Iterator[dict[str, Any]]:
    """What the page shows of each edit of a layer; kept: what it and those before it leave.

    widths: how many hidden units each expert then has, where some of them go.
    """
    for number, edit in enumerate(chain.edits, start=1):
        so_far = Chain(chain.edits[:number])
        widths = _widths(so_far)
        yield _row(edit, so_far.experts_kept) | ({"widths": widths} if widths else {})


def _row(edit: Edit, kept: tuple[int, ...] | None) -> dict[str, Any]:
    """An edit for the page: its words, and experts by their numbers before any edit.

    num_experts: how many the layer has at least, by the experts that the edit names.
    """
    cells = {column: items for column, items in edit.cells.items() if items}
    return {
        "index": edit.index,
        "name": edit.name,
        "edit": edit.kind,
        "title": edit.title,
        "changes": edit.changes,
        "kept": kept,
        "num_experts": max(edit.named_experts, default=-1) + 1,
        "cells": cells,
        "divergence": edit.divergence,
    }


def _widths(chain: Chain) -> list[int | None]:
    """How many hidden units each expert has behind the edits; empty where none of them says."""
    number = max((len(edit.expert_scores) for edit in chain.edits), default=0)
    widths = [chain.width_of(expert) for expert in range(number)]
    return widths if any(width is not None for width in widths) else []


def read_usage(text: str | None) -> dict[str, list[float | None]]:
    """The experts' usage by layer."""
    usage: dict[str, list[float | None]] = {}
    for row in csv.DictReader(io.StringIO(text or "")):
        values, expert = usage.setdefault(row["layer"], []), int(row["expert"])
        values.extend([None] * (expert + 1 - len(values)))
        values[expert] = _short(row["usage"]) if row["usage"] else None
    return usage


def curve_rows(text: str | None) -> Iterator[dict[str, Any]]:
    """The rows of a curve, as far as they are whole."""
    for line in (text or "").splitlines():
        try:
            yield json.loads(line, parse_constant=_nothing)
        except ValueError:  # the last line of a killed run
            return


def commands_of(commit: str | None, overrides: list[str], hydra: str | None) -> list[str]:
    """The shell lines that make this run again."""
    lines = []
    if commit and commit != "unknown":
        name, _, dirty = commit.partition("+")
        lines.append(f"git checkout {name}" + ("  # and changes not committed" if dirty else ""))
    if not overrides and hydra is None:
        return lines
    return [*lines, shlex.join(["python", "run.py", *words_of(overrides, hydra)])]


def words_of(overrides: Sequence[str], hydra: str | None) -> list[str]:
    """What run.py is given to make a run again; hydra: its hydra.yaml."""
    asked = [override for override in overrides if not override.startswith("resume=")]
    places = re.findall(
        CONFIG_FOLDER, hydra or "", re.MULTILINE
    )  # of one's own metrics and the like
    # An experiment's file asks for a sweep by itself; this is one job of it.
    of_experiment = any(override.startswith("+") for override in overrides)
    sweeps = hydra is None or re.search(r"^  mode: MULTIRUN$", hydra, re.MULTILINE)
    single = ["hydra.mode=RUN"] if of_experiment and sweeps else []
    folders = [word for place in places for word in ("--config-dir", place)]
    return [*folders, *asked, *single]


def versions_of(one: Mapping[str, Any], config: str | None, hydra: str | None) -> dict[str, str]:
    """Those of the packages that made the run's first result, where its store still has it."""
    names = [value for key, value in one.items() if key.startswith("artifact/") and value]
    root = re.search(r"^store: (.+)$", config or "", re.MULTILINE)
    working = re.search(r"^    cwd: (.+)$", hydra or "", re.MULTILINE)
    if not names or not root:
        return {}
    path = Path(working[1] if working else ".") / root[1] / names[0] / store.DONE
    try:
        versions: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["versions"]
        return versions
    except (OSError, ValueError, KeyError):
        return {}


def files_of(folder: Path) -> Iterator[str]:
    """The files of a run; not those of runs below it, nor of other programs."""
    for path in sorted(folder.iterdir()):
        if path.name in LISTED:
            yield from (f"{path.name}/{one.name}" for one in sorted(path.iterdir()))
        elif path.is_file() and not path.name.endswith(PARTIAL):
            yield path.name


def read_text(path: Path) -> str | None:
    """A file's text; None where there is no such file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None


def tail_of(path: Path) -> str | None:
    """The last LOG_LINES of a log; None where there is none."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LOG_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    return "\n".join(lines[-LOG_LINES:])


def _short(text: str) -> float | None:
    value = float(f"{float(text):.4g}")
    return value if math.isfinite(value) else None


def _nothing(_: str) -> None:
    """NaN and the infinities, which JSON does not have."""
