"""A report as tables, for a terminal and in Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from moe_lab.report.figures import (
    EDITED,
    MAIN_QUALITIES,
    MISSING,
    RESULT_ROWS,
    VARIANTS,
    figure_of,
    figure_text,
    finite,
    main_metric,
    signed,
    unit_of,
)
from moe_lab.report.units import SHARE


def result_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """The result table as text: a head with the variants present, then a row per figure."""
    variants = _variants(report)
    body = [
        [f"{task} ({metric})", *_cells(report, variants, f"eval/{task}/{metric}")]
        for task, metric in _tasks(report, variants)
    ]
    figures = [
        [figure.unit.above(figure.title), *_cells(report, variants, figure.name)]
        for figure in RESULT_ROWS
    ]
    body += [row for row in figures if any(cell != MISSING for cell in row[1:])]
    body += _given(report, variants)
    return [["", *(name.replace("_top_", " top-") for name in variants)], *body]


def summary_line(report: Mapping[str, Any]) -> str:
    """A finished job in half a line: "average accuracy: dense 87.8 %, compressed 84.0 %"."""
    for figure in MAIN_QUALITIES:
        keys = {name: f"{name}/{figure.name}" for name in figure.columns}
        there = {name: key for name, key in keys.items() if report.get(key) is not None}
        if there:
            told = (f"{name} {figure_text(key, report[key])}" for name, key in there.items())
            return f"{figure.title}: {', '.join(told)}"
    return ""


def stage_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """The stages, and what is around them, as text: what each took, and if it was found finished.

    The first row is a head.
    """
    stages = [key.removeprefix("seconds/") for key in report if key.startswith("seconds/")]
    body = [
        [
            stage,
            _took(report[f"seconds/{stage}"]),
            figure_text(f"cached/{stage}", report.get(f"cached/{stage}")),
        ]
        for stage in stages
    ]
    return [["stage", "took", "cached"], *body]


def result_table(report: Mapping[str, Any]) -> Table:
    """The result table for a terminal."""
    return _rich(result_rows(report))


def stages_table(report: Mapping[str, Any]) -> Table:
    """What each stage took, and what was found finished, for a terminal."""
    return _rich(stage_rows(report))


def result_markdown(report: Mapping[str, Any]) -> str:
    """The result table as GitHub Markdown."""
    head, *body = result_rows(report)
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


def _tasks(report: Mapping[str, Any], variants: list[str]) -> list[tuple[str, str]]:
    """Each evaluated task with its main metric, in the order of the report."""
    metrics: dict[str, list[str]] = {}
    for key in report:
        variant, _, rest = key.partition("/eval/")
        task, _, metric = rest.rpartition("/")
        if variant in variants and task not in ("", "routing") and not metric.endswith("_stderr"):
            metrics.setdefault(task, []).append(metric)
    return [(task, main_metric(names)) for task, names in metrics.items()]


def _cells(report: Mapping[str, Any], variants: list[str], key: str) -> list[str]:
    """A figure's cells; of shares with the difference to dense in points."""
    cells = [figure_text(key, report.get(f"{variant}/{key}")) for variant in variants]
    if unit_of(key) is not SHARE:
        return cells
    dense = report.get(f"dense/{key}")
    for position, variant in enumerate(variants):
        value = report.get(f"{variant}/{key}")
        if variant != "dense" and value is not None and dense is not None:
            cells[position] += f" ({signed(100 * (value - dense))})"
    return cells


def _given(report: Mapping[str, Any], variants: list[str]) -> list[list[str]]:
    """What the plan gives, where something else was asked for."""
    rows = []
    for key, asked in (("plan/ratio", "ratio"), ("plan/target_gib", "ratio/target_gib")):
        given, wanted = report.get(key), report.get(asked)
        if given is None or wanted is None or math.isclose(given, wanted, abs_tol=1e-6):
            continue
        figure = figure_of(key)
        title = figure.title if figure else key
        cells = [figure_text(key, given) if one in EDITED else MISSING for one in variants]
        rows.append([f"{title}, asked {figure_text(key, wanted)}", *cells])
    return rows


def _took(seconds: float | None) -> str:
    return MISSING if finite(seconds) is None else f"{seconds:.1f} s"


def _rich(lines: list[list[str]]) -> Table:
    head, *body = lines
    made = Table()
    for position, name in enumerate(head):
        made.add_column(name, justify="right" if position else "left")
    for line in body:
        made.add_row(*line)
    return made
