"""The matrix of engines: in a terminal, and as Markdown between the marks of a page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from rich.table import Table
from rich.text import Text

from moe_lab.models.form_kinds import FEATURES
from moe_lab.report.serving import ENGINES, VERDICT_WORDS, Cell, Matrix, engine_title

MARKS = "<!-- serving: made by python -m moe_lab.serving --write -->", "<!-- /serving -->"
FORM_MARKS = "<!-- forms: made by python -m moe_lab.serving --write -->", "<!-- /forms -->"
_STYLES = {"silent": "bold red", "own fault": "yellow", "crashed": "red", "refused": "yellow"}
NOT_RUN = "–"


def by_subject(cells: Iterable[Cell]) -> dict[str, dict[str, dict[str, Cell]]]:
    """The cells by subject, by what was made of it, and by engine."""
    found: dict[str, dict[str, dict[str, Cell]]] = {}
    for cell in cells:
        found.setdefault(cell.subject, {}).setdefault(cell.made, {})[cell.engine] = cell
    return found


def serving_table(matrix: Matrix) -> Table:
    """A line for each checkpoint."""
    there = _engines(matrix)
    table = Table("checkpoint", "form", *(matrix.version(engine) for engine in there))
    for subject, rows in by_subject(matrix.cells).items():
        table.add_section()
        table.add_row(Text(subject, "bold"))
        for made, row in rows.items():
            cells = [_styled(row.get(engine)) for engine in there]
            table.add_row(made, next(iter(row.values())).form, *cells)
    return table


def _styled(cell: Cell | None) -> str:
    if cell is None:
        return NOT_RUN
    return f"[{_STYLES.get(cell.verdict, 'default')}]{cell.words}"


def _engines(matrix: Matrix) -> list[str]:
    return [engine for engine in ENGINES if engine in matrix.versions]


def matrix_markdown(matrix: Matrix) -> str:
    """The versions, the verdict_counts, a table for each subject, and why what is refused is."""
    there = _engines(matrix)
    parts = ["\n".join(_versions(matrix, engine) for engine in there), verdict_counts(matrix)]
    for subject, rows in by_subject(matrix.cells).items():
        heads = (matrix.version(engine) for engine in there)
        family = _family(next(iter(rows.values())))
        lines = [
            f"| {subject} ({family}) | form | {' | '.join(heads)} |",
            "| --- " * (len(there) + 2) + "|",
        ]
        for made, row in rows.items():
            form = next(iter(row.values())).form
            form += f", as {_family(row)}" if _family(row) != family else ""
            cells = (row[engine].words if engine in row else NOT_RUN for engine in there)
            lines.append(f"| {made} | {form} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, *reasons(matrix.cells)])


def _versions(matrix: Matrix, engine: str) -> str:
    beside = ", ".join(f"{name} {one}" for name, one in matrix.versions[engine].items())
    return f"- **{engine_title(engine)}**: {beside}"


def _family(row: dict[str, Cell]) -> str:
    return next(iter(row.values())).family


def verdict_counts(matrix: Matrix) -> str:
    """How many checkpoints each engine made right, refused or garbled, in a sentence each."""
    told = []
    for engine in _engines(matrix):
        cells = [cell for cell in matrix.cells if cell.engine == engine]
        numbers = (
            f"{number} {words}"
            for verdict, words in reversed(VERDICT_WORDS.items())
            if (number := sum(cell.verdict == verdict for cell in cells))
        )
        told.append(
            f"- {matrix.version(engine)}: of {len(cells)} checkpoints {', '.join(numbers)}."
        )
    silent = sum(cell.verdict == "silent" for cell in matrix.cells)
    return "\n".join([*told, f"- Silently wrong: {silent}."])


def reasons(cells: Sequence[Cell]) -> list[str]:
    """What was said where an engine refused or crashed, or is right by a setting: each once."""
    titles = {
        "refused": "Refused, and in which words",
        "crashed": "Crashed",
        "right": "Right by a setting",
    }
    found: dict[str, dict[tuple[str, str], list[str]]] = {title: {} for title in titles}
    for cell in cells:
        if cell.detail and cell.verdict in titles:
            key = (cell.engine, _plain(cell.detail))
            found[cell.verdict].setdefault(key, []).append(f"{cell.subject} ({cell.made})")
    return [
        f"**{title}.**\n\n"
        + "\n".join(
            f"- {engine_title(engine)}: {text}: {_some(where)}"
            for (engine, text), where in found[verdict].items()
        )
        for verdict, title in titles.items()
        if found[verdict]
    ]


def _some(where: Sequence[str], number: int = 3) -> str:
    more = f" and {len(where) - number} more" if len(where) > number else ""
    return ", ".join(where[:number]) + more


def _plain(text: str) -> str:
    """Without paths of this machine, and safe in Markdown."""
    text = re.sub(r"(/[\w.+-]+){3,}", "…", text)
    return text.replace("|", "\\|").replace("<", "&lt;")


def form_words() -> str:
    """The words for forms, and what each means."""
    rows = [f"| {name} | {about} |" for name, about in FEATURES.items()]
    return "\n".join(["| word | what it means |", "| --- | --- |", *rows])


def with_matrix(page: str, matrix: Matrix) -> str:
    """A page with what stands between its marks made anew; ValueError where it has none."""
    if MARKS[0] not in page:
        raise ValueError(f"it has no line {MARKS[0]!r}")
    for (start, end), made in ((MARKS, matrix_markdown(matrix)), (FORM_MARKS, form_words())):
        if start in page:
            before, rest = page.split(start)
            page = f"{before}{start}\n\n{made}\n\n{end}{rest.split(end, 1)[1]}"
    return page
