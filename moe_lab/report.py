"""A run's result: one flat JSON object, and the tables made from it.

The keys are the contract: `<variant>/<figure>` for dense, compressed and finetuned, and
`seconds/<stage>`, `cached/<stage>` for the stages.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from moe_lab.types import UserError

FILE = "report.json"
VARIANTS = ("dense", "compressed", "finetuned")
MISSING = "–"
TITLES = {
    "average": "average accuracy",
    "kl": "KL to dense",
    "active_parameters": "active parameters",
    "parameter_ratio": "parameters left",
    "flops_per_token": "FLOPs per token",
    "bytes": "size on disk",
    "bytes_ratio": "size on disk, of dense",
    "memory_ratio": "peak memory",
    "prefill_speedup": "prefill speed",
    "decode_speedup": "decode speed",
}

# A task may give several metrics; the first of these that it has stands for it.
MAIN_METRICS = ("acc_norm", "acc", "exact_match", "f1", "bits_per_byte", "byte_perplexity")
SHARES = frozenset({"acc_norm", "acc", "exact_match", "f1"})  # 0 to 1, shown in percent
MORE_IS_BETTER = re.compile(rf"({'|'.join(SHARES)}|average|\w+_speedup)$")
LESS_IS_BETTER = re.compile(
    r"(kl|loss|\w*perplexity|bits_per_byte|parameters|active_parameters|parameter_ratio|"
    r"flops_per_token|bytes|bytes_ratio|peak_memory_bytes|memory_ratio|\w*seconds)$"
)

Report = dict[str, str | int | float | bool | None]


def write(folder: Path, report: Mapping[str, Any]) -> Path:
    """Write report.json into the run's folder, keys in the order given, and return its path.

    NaN and infinities become null. Raises TypeError for a value that is not flat.
    """
    for key, value in report.items():
        if value is not None and not isinstance(value, (str, int, float)):
            raise TypeError(f"report[{key!r}] is a {type(value).__name__}, not text or a number")
    path = folder / FILE
    plain = {key: _finite(value) for key, value in report.items()}
    partial = folder / f".{FILE}.partial"
    partial.write_text(json.dumps(plain, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return path


def read(folder: Path) -> Report:
    """The report that `write` put into a run's folder; UserError for a file that is none."""
    path = folder / FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict) or "status" not in found:
        raise UserError(f"{path} cannot be read: it is no report, which has a status")
    return found


def order(folder: Path) -> list[tuple[int, str]]:
    """Sorts the folders of jobs: 10 after 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in folder.parts]


def main_metric(metrics: Iterable[str]) -> str:
    """The one metric that stands for a task: the first of MAIN_METRICS, else the first given."""
    given = list(metrics)
    return next((name for name in MAIN_METRICS if name in given), given[0])


def rows(report: Mapping[str, Any]) -> list[list[str]]:
    """The result table as text: a head with the variants present, then a row per figure."""
    variants = _variants(report)
    body = [
        [f"{task} ({metric})", *_scores(report, variants, f"eval/{task}/{metric}", metric)]
        for task, metric in _tasks(report, variants)
    ]
    figures = [
        ["average accuracy", *_scores(report, variants, "eval/average", "acc")],
        ["KL to dense (nats per token)", *_figures(report, variants, "kl")],
        ["experts per token", *_figures(report, variants, "eval/routing/top_k")],
        ["router entropy (nats)", *_figures(report, variants, "eval/routing/entropy")],
        ["parameters", *_figures(report, variants, "parameters")],
        ["active parameters", *_figures(report, variants, "active_parameters")],
        ["FLOPs per token", *_figures(report, variants, "flops_per_token")],
        ["size on disk", *_figures(report, variants, "bytes")],
        ["peak memory of a forward", *_figures(report, variants, "memory_ratio")],
        ["prefill speed", *_figures(report, variants, "prefill_speedup")],
        ["decode speed", *_figures(report, variants, "decode_speedup")],
        ["loads in stock transformers", *_figures(report, variants, "stock")],
    ]
    body += [row for row in figures if any(cell != MISSING for cell in row[1:])]
    return [["", *(name.replace("_top_", " top-") for name in variants)], *body]


def summary(report: Mapping[str, Any]) -> str:
    """A finished job in half a line: "average accuracy: dense 87.8 %, compressed 84.0 %"."""
    for key, variants in (("eval/average", VARIANTS), ("kl", VARIANTS[1:])):
        there = [name for name in variants if report.get(f"{name}/{key}") is not None]
        if there:
            told = (f"{name} {shown(key, report[f'{name}/{key}'])}" for name in there)
            return f"{TITLES[key.rpartition('/')[2]]}: {', '.join(told)}"
    return ""


def stage_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """The stages as text: a head, then what each took and whether it was found finished."""
    stages = [key.removeprefix("seconds/") for key in report if key.startswith("seconds/")]
    body = [
        [
            stage,
            shown("seconds", report.get(f"seconds/{stage}")),
            shown("cached", report.get(f"cached/{stage}")),
        ]
        for stage in stages
    ]
    return [["stage", "took", "cached"], *body]


def shown(key: str, value: Any) -> str:
    """One figure as text, by the last part of its key: 12.3 %, 1.20×, 3.9 M, 0.1352."""
    if _finite(value) is None:
        return MISSING
    name = key.rpartition("/")[2]
    text = _percent(value) if name in SHARES else FORMATS.get(name, "{:.3f}".format)(value)
    return text if re.search("[1-9]", text) else text.removeprefix("-")


def better(key: str) -> int:
    """1 where more of a figure is better, -1 where less is, 0 where neither; by its last part."""
    name = "seconds" if key.startswith("seconds/") else key.rpartition("/")[2]
    return bool(MORE_IS_BETTER.match(name)) - bool(LESS_IS_BETTER.match(name))


def difference(key: str, value: float) -> str:
    """A difference of figures with its sign: points of a percentage, else as it is shown."""
    name = key.rpartition("/")[2]
    if name in SHARES or FORMATS.get(name) is _percent:
        return _signed(100 * value)
    size = shown(key, abs(value))
    return size if size == shown(key, 0.0) else ("+" if value > 0 else "−") + size


def is_truth(key: str) -> bool:
    """Whether a figure is a yes or a no."""
    return FORMATS.get(key.rpartition("/")[2]) is _yes_or_no


def titles(key: str) -> tuple[str, str]:
    """A figure's variant and its name, for people: ("compressed", "KL to dense")."""
    variant, _, rest = key.partition("/")
    if not rest or variant.partition("_top_")[0] not in VARIANTS:
        return "", key
    task, _, metric = rest.removeprefix("eval/").rpartition("/")
    name = f"{task} {metric}" if task else TITLES.get(metric, metric)
    return variant.replace("_top_", " top-"), name


def table(report: Mapping[str, Any]) -> Table:
    """The result table for a terminal."""
    return _rich(rows(report))


def stages_table(report: Mapping[str, Any]) -> Table:
    """What each stage took, and what was found finished, for a terminal."""
    return _rich(stage_rows(report))


def markdown(report: Mapping[str, Any]) -> str:
    """The result table as GitHub Markdown."""
    head, *body = rows(report)
    rule = ["---", *["---:" for _ in head[1:]]]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *body]) + "\n"


def _variants(report: Mapping[str, Any]) -> list[str]:
    """The variants present; each one's <variant>_top_<k> behind it."""
    there = dict.fromkeys(key.partition("/")[0] for key in report if "/" in key)
    return [
        name
        for variant in VARIANTS
        for name in there
        if name == variant or name.startswith(f"{variant}_top_")
    ]


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tasks(report: Mapping[str, Any], variants: list[str]) -> list[tuple[str, str]]:
    """Each evaluated task with its main metric, in the order of the report."""
    metrics: dict[str, list[str]] = {}
    for key in report:
        variant, _, rest = key.partition("/eval/")
        task, _, metric = rest.rpartition("/")
        if variant in variants and task not in ("", "routing") and not metric.endswith("_stderr"):
            metrics.setdefault(task, []).append(metric)
    return [(task, main_metric(names)) for task, names in metrics.items()]


def _scores(report: Mapping[str, Any], variants: list[str], key: str, metric: str) -> list[str]:
    """One task's cells: shares in percent, with the difference to dense in points."""
    cells = _figures(report, variants, key)
    if metric not in SHARES:
        return cells
    dense = report.get(f"dense/{key}")
    for position, variant in enumerate(variants):
        value = report.get(f"{variant}/{key}")
        if variant != "dense" and value is not None and dense is not None:
            cells[position] += f" ({_signed(100 * (value - dense))})"
    return cells


def _figures(report: Mapping[str, Any], variants: list[str], key: str) -> list[str]:
    return [shown(key, report.get(f"{variant}/{key}")) for variant in variants]


def _signed(points: float) -> str:
    """A difference with its sign, a typographic minus, and no sign on zero."""
    text = f"{points:+.1f}".replace("-", "−")
    return "0.0" if text[1:] == "0.0" else text


def _scaled(value: float, units: tuple[str, ...]) -> str:
    """Three or so digits and a thousands' prefix: 12.3 M."""
    power = 0
    while abs(value) >= 999.95 and power < len(units) - 1:
        value /= 1000
        power += 1
    return f"{value:.{1 if power else 0}f} {units[power]}".strip()


def _count(value: float) -> str:
    return _scaled(value, ("", "k", "M", "B", "T"))


def _bytes(value: float) -> str:
    return _scaled(value, ("B", "kB", "MB", "GB", "TB"))


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _yes_or_no(value: float) -> str:
    """Yes, no, or of several reports how many say yes."""
    return {0: "no", 1: "yes"}.get(value) or f"{100 * value:.0f} % yes"


FORMATS: dict[str, Callable[[Any], str]] = {
    "average": _percent,
    "kl": "{:.4f}".format,
    "parameters": _count,
    "active_parameters": _count,
    "flops_per_token": _count,
    "top_k": "{:g}".format,
    "parameter_ratio": _percent,
    "bytes": _bytes,
    "bytes_ratio": _percent,
    "peak_memory_bytes": _bytes,
    "prefill_seconds": "{:.3f} s".format,
    "decode_seconds_per_token": "{:.3f} s".format,
    "memory_ratio": _percent,
    "prefill_speedup": "{:.2f}×".format,
    "decode_speedup": "{:.2f}×".format,
    "stock": _yes_or_no,
    "seconds": "{:.1f} s".format,
    "cached": _yes_or_no,
}


def _rich(lines: list[list[str]]) -> Table:
    head, *body = lines
    made = Table()
    for position, name in enumerate(head):
        made.add_column(name, justify="right" if position else "left")
    for line in body:
        made.add_row(*line)
    return made
