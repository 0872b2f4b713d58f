"""The table of families: in a terminal, and as Markdown between the marks of a page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
import transformers
from rich.table import Table
from rich.text import Text

from moe_lab.families.all_types import Row
from moe_lab.families.checks import CHECKS, NOT_REACHED
from moe_lab.families.outcome import Outcome

COLUMNS = tuple(CHECKS)
TYPE_GROUPS = {
    "Causal language models": ("AutoModelForCausalLM",),
    "With images, video or audio": ("AutoModelForImageTextToText", "AutoModelForMultimodalLM"),
    "Neither": ("AutoModelForSeq2SeqLM", "AutoModelForTokenClassification"),
}
CELL_WORDS = {"silent": "SILENT", "not reached": "–", "none": "–"}
CELL_STYLES = {"fault": "red", "silent": "bold red", "refused": "yellow", "not built": "yellow"}
ESSENTIAL = ("find", "observe", "prune", "merge", "unequal", "layer by layer")
WORKS = ("yes", "stock", "own", "none")
TABLE_MARKS = "<!-- families: made by python -m moe_lab.families --write -->", "<!-- /families -->"
COUNT_MARKS = (
    "<!-- families, counts: made by python -m moe_lab.families --write -->",
    "<!-- /families, counts -->",
)


def by_group(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each of TYPE_GROUPS, by name."""
    ordered = sorted(rows, key=lambda row: row.name)
    return {
        group: some
        for group, kinds in TYPE_GROUPS.items()
        if (some := [row for row in ordered if row.auto in kinds])
    }


def cell(row: Row, column: str) -> str:
    """What a table says of one check: a word, with * where no reference could be computed."""
    outcome = row.outcomes.get(column, NOT_REACHED)
    return CELL_WORDS.get(outcome.state, outcome.state) + "*" * bool(outcome.unchecked)


def terminal_table(rows: Iterable[Row]) -> Table:
    """A line for each type."""
    table = Table("type", *COLUMNS, "seconds")
    for group, some in by_group(rows).items():
        table.add_section()
        table.add_row(Text(group, "bold"))
        for row in some:
            states = {column: row.outcomes.get(column, NOT_REACHED).state for column in COLUMNS}
            cells = [
                f"[{CELL_STYLES.get(states[column], 'default')}]{cell(row, column)}"
                for column in COLUMNS
            ]
            table.add_row(row.name, *cells, f"{row.seconds:.0f}")
    return table


def markdown(rows: Sequence[Row]) -> str:
    """The tables, and below them why what does not work does not."""
    parts = [f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}."]
    for group, some in by_group(rows).items():
        head = f"| {group} | {' | '.join(COLUMNS)} |"
        lines = [head, "| --- " * (len(COLUMNS) + 1) + "|"]
        for row in some:
            lines.append(f"| {row.name} | {' | '.join(cell(row, one) for one in COLUMNS)} |")
        parts.append("\n".join(lines))
    parts.append(counts(rows))
    return "\n\n".join([*parts, *sentences(rows)])


def sentences(rows: Iterable[Row]) -> list[str]:
    """What is refused, wrong, not built or unchecked, and why: a list for each kind."""
    titles = {
        "silent": "Wrong without a word",
        "fault": "Faults",
        "refused": "Refused, and why",
        "not built": "Not built: no tiny model could be made by guessing",
        "unchecked": "Marked *: no independent reference",
    }
    found: dict[str, list[str]] = {title: [] for title in titles}
    for row in sorted(rows, key=lambda row: row.name):
        for detail, columns in _by_detail(row.outcomes).items():
            state, text = detail
            where = "" if columns == list(COLUMNS) else f", {', '.join(columns)}"
            found[state].append(f"- {row.name}{where}: {_plain(text)}")
    return [
        f"**{title}.**\n\n" + "\n".join(found[state])
        for state, title in titles.items()
        if found[state]
    ]


def _by_detail(outcomes: Mapping[str, Outcome]) -> dict[tuple[str, str], list[str]]:
    found: dict[tuple[str, str], list[str]] = {}
    for column, outcome in outcomes.items():
        if outcome.state in ("silent", "fault", "refused", "not built"):
            found.setdefault((outcome.state, outcome.detail), []).append(column)
        if outcome.unchecked:
            found.setdefault(("unchecked", outcome.unchecked), []).append(column)
    return found


def _plain(text: str) -> str:
    """Without the temporary folder of the checkpoint, and safe in Markdown."""
    text = re.sub(r"\S*moe_lab_families_\S*?/(dense|made_\d+)", "the checkpoint", text)
    return text.replace("|", "\\|").replace("<", "&lt;")


def counts(rows: Sequence[Row]) -> str:
    """How many types work, in a sentence for each group."""
    told = []
    for group, some in by_group(rows).items():
        some = [row for row in some if "+" not in row.name]  # variants are no types of their own
        whole = [row for row in some if _works(row, COLUMNS)]
        essential = [row for row in some if _works(row, ESSENTIAL)]
        told.append(
            f"- {group}: of {len(some)} types {len(essential)} can be profiled (also layer by "
            f"layer), pruned, merged and given unequal budgets; {len(whole)} can also be condensed "
            "and have layers dropped."
        )
    silent = sum(one.state == "silent" for row in rows for one in row.outcomes.values())
    told.append(f"- Silent differences: {silent}.")
    return "\n".join(told)


def _works(row: Row, columns: Iterable[str]) -> bool:
    return all(row.outcomes.get(column, NOT_REACHED).state in WORKS for column in columns)


def with_table(page: str, rows: Sequence[Row]) -> str:
    """A page with what stands between its marks made anew; ValueError where it has none."""
    filled = page
    for (start, end), made in ((TABLE_MARKS, markdown), (COUNT_MARKS, counts)):
        if start in page:
            before, rest = filled.split(start)
            filled = f"{before}{start}\n\n{made(rows)}\n\n{end}{rest.split(end, 1)[1]}"
    if not any(start in page for start, _ in (TABLE_MARKS, COUNT_MARKS)):
        raise ValueError(f"it has no line {TABLE_MARKS[0]!r} nor {COUNT_MARKS[0]!r}")
    return filled


def states_in(page: str) -> dict[str, dict[str, str]]:
    """What the tables of a page say of each type, by column."""
    told = page.split(TABLE_MARKS[0])[1].split(TABLE_MARKS[1])[0]
    rows = [line.strip("| ").split(" | ") for line in told.splitlines() if line.startswith("| ")]
    return {
        cells[0]: dict(zip(COLUMNS, cells[1:], strict=True))
        for cells in rows
        if cells[0] not in TYPE_GROUPS and not cells[0].startswith("---")
    }
