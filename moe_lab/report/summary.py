"""A report as tables, for a terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from moe_lab.report.figures import (
    MISSING,
    SHARES,
    TITLES,
    VARIANTS,
    figure_text,
    main_metric,
    signed,
)


def result_rows(report: Mapping[str, Any]) -> list[list[str]]:
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


def summary_line(report: Mapping[str, Any]) -> str:
    """A finished job in half a line: "average accuracy: dense 87.8 %, compressed 84.0 %"."""
    for key, variants in (("eval/average", VARIANTS), ("kl", VARIANTS[1:])):
        there = [name for name in variants if report.get(f"{name}/{key}") is not None]
        if there:
            told = (f"{name} {figure_text(key, report[f'{name}/{key}'])}" for name in there)
            return f"{TITLES[key.rpartition('/')[2]]}: {', '.join(told)}"
    return ""


def stage_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """The stages as text: a head, then what each took and whether it was found finished."""
    stages = [key.removeprefix("seconds/") for key in report if key.startswith("seconds/")]
    body = [
        [
            stage,
            figure_text("seconds", report.get(f"seconds/{stage}")),
            figure_text("cached", report.get(f"cached/{stage}")),
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


def _scores(report: Mapping[str, Any], variants: list[str], key: str, metric: str) -> list[str]:
    """One task's cells: shares in percent, with the difference to dense in points."""
    cells = _figures(report, variants, key)
    if metric not in SHARES:
        return cells
    dense = report.get(f"dense/{key}")
    for position, variant in enumerate(variants):
        value = report.get(f"{variant}/{key}")
        if variant != "dense" and value is not None and dense is not None:
            cells[position] += f" ({signed(100 * (value - dense))})"
    return cells


def _figures(report: Mapping[str, Any], variants: list[str], key: str) -> list[str]:
    return [figure_text(key, report.get(f"{variant}/{key}")) for variant in variants]


def _rich(lines: list[list[str]]) -> Table:
    head, *body = lines
    made = Table()
    for position, name in enumerate(head):
        made.add_column(name, justify="right" if position else "left")
    for line in body:
        made.add_row(*line)
    return made
