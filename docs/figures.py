"""The tables of figures in docs/reference.md, made from FIGURES in moe_lab/report/figures.py.

`python docs/figures.py` writes them between their marks. tests/test_docs.py holds the page to it.
"""

from __future__ import annotations

from pathlib import Path

from moe_lab.report.figures import COST, EXPERTS, FIGURES, LESS, MORE, QUALITY, Figure
from moe_lab.report.units import AS_MEASURED

END = "<!-- /figures -->"
HEAD = (
    "| key | what it is | unit | better | when it is there |\n| --- | --- | --- | --- | --- |"
)  # fmt: skip
WORDS = {MORE: "more", LESS: "less", 0: "–"}


def mark(section: str) -> str:
    """What stands before the table of a section."""
    return f"<!-- figures, {section}: made by docs/figures.py -->"


def row(figure: Figure) -> str:
    """A figure's line."""
    better = "by metric" if figure.unit is AS_MEASURED else WORDS[figure.better]
    cells = (f"`{figure.key}`", figure.about, figure.unit.name, better, figure.when)
    return f"| {' | '.join(cells)} |"


def table(section: str) -> str:
    """The figures of a section, as Markdown."""
    return "\n".join([HEAD, *(row(figure) for figure in FIGURES if figure.section == section)])


def with_tables(text: str) -> str:
    """A page with the tables between their marks made anew."""
    for section in (QUALITY, COST, EXPERTS):
        start, rest = text.split(mark(section))
        _, end = rest.split(END, 1)
        text = f"{start}{mark(section)}\n{table(section)}\n{END}{end}"
    return text


if __name__ == "__main__":
    page = Path(__file__).parent / "reference.md"
    page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
