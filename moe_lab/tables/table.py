"""A table for people and for files: Markdown, CSV, LaTeX (booktabs) and the terminal."""

from __future__ import annotations

import itertools
import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import IO, Any

import pandas as pd
from rich.table import Table as RichTable
from rich.text import Text

from moe_lab.console import terminal
from moe_lab.report.figures import (
    MISSING,
    better,
    difference_text,
    figure_text,
    is_truth,
    titles_of,
)
from moe_lab.report.frame import STATUS
from moe_lab.report.report import OK
from moe_lab.tables.comparison import Comparison, stars
from moe_lab.tables.pivot import Column, Pivot, remarks, state

WIDE = 200  # columns of a file or pipe, which has no width to fit to
BOLD = "\0"  # begins a cell that is bold: no report has it
EQUAL = 1e-12  # as far apart as equal numbers are that were added up in another order
# What says how much of a model is gone: the best is told among rows that are alike in these.
SIZE_KEYS = ("model", "ratio", "ratio/target_gib", "condense/num_layers", "merge/num_experts")
# Styler's own escape does not know signs beyond ASCII, nor brackets at the start of a line.
LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#",
    "%": r"\%", "_": r"\_", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "±": r"$\pm$", "×": r"$\times$", "−": r"$-$", "–": "--", "≤": r"$\le$", "≥": r"$\ge$",
    "[": "{[}", "]": "{]}", "*": "{*}",  # else taken for an argument of the line before
    "<": r"$<$", ">": r"$>$", "|": r"\textbar{}", "→": r"$\to$", "Δ": r"$\Delta$",
}  # fmt: skip
FORMULA = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")  # what begins one; full-width signs, too
PLAIN_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(inf|nan)")
Writer = Callable[[str], str]


@dataclass(frozen=True)
class Table:
    """A table as it is shown.

    index: the labels of the rows, a column for each key; text: the cells, a column for each of
    `columns`; best: whether a cell is bold; numbers: the same for files, further columns between
    them; notes: what a reader must know to read it; origin: where it comes from.
    """

    index: pd.DataFrame
    columns: tuple[Column, ...]
    text: pd.DataFrame
    best: pd.DataFrame
    numbers: pd.DataFrame
    notes: tuple[str, ...]
    origin: tuple[str, ...]

    @property
    def remarks(self) -> tuple[str, ...]:
        """Notes, then origin."""
        return self.notes + self.origin

    def only(self, wanted: pd.Series) -> Table:
        """The rows where `wanted` is true."""
        names = ("index", "text", "best", "numbers")
        kept = {name: getattr(self, name)[wanted].reset_index(drop=True) for name in names}
        return replace(self, **kept)

    def markdown(self) -> str:
        """GitHub Markdown, the remarks as a list below."""
        rule = ["---"] * len(self.index.columns) + ["---:"] * len(self.text.columns)
        rows = [self._head(), rule, *self._body("**{}**".format)]
        lines = ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]
        return "\n".join([*lines, "", *(f"- {remark}" for remark in self.remarks)]) + "\n"

    def csv(self) -> str:
        """Plain numbers to ten digits; deviation, difference and p behind their figure.

        Text that a spreadsheet would take for a formula has an apostrophe before it.
        """
        whole = pd.concat([self.index, self.numbers], axis=1).rename(columns=_no_formula)
        return whole.map(_no_formula).to_csv(index=False, float_format="%.10g")

    def latex(self) -> str:
        """A floating table, made smaller where it is too wide; its origin as comments above."""
        head, rules = self._latex_head()
        cells = pd.DataFrame(self._body(r"\textbf{{{}}}".format, latex), columns=head)
        spec = "l" * len(self.index.columns) + "r" * len(self.columns)
        styled = cells.style.hide(axis="index")
        lines = styled.to_latex(hrules=True, column_format=spec, multicol_align="c").splitlines()
        lines[3:3] = [rules] if rules else []  # below the upper of two head rows
        notes = [rf"\par\smallskip\footnotesize {latex(note)}" for note in self.notes]
        # Styler floats a table and captions it; only we fit it to the page.
        return "\n".join([
            r"% \usepackage{booktabs,graphicx}", *(f"% {remark}" for remark in self.origin),
            r"\begin{table}", r"\centering", r"\small",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            *lines[:-1], rf"{lines[-1]}}}", *notes, r"\end{table}", "",
        ])  # fmt: skip

    def show(self, file: IO[str] | None = None) -> None:
        """Print it, fitted to the terminal; into a file where one is given."""
        made = RichTable()
        for position, name in enumerate(self._head()):
            shown = re.sub(r"(?<=[/_])|(?= \()", "\n", name)  # keys are long: let them fold
            is_label = position < len(self.index.columns)
            made.add_column(shown, justify="left" if is_label else "right", overflow="fold")
        for row in self._body(BOLD.__add__):
            made.add_row(*map(_styled, row))
        console = terminal(file)
        if not console.is_terminal and "COLUMNS" not in os.environ:
            console.width = WIDE
        if len(self.index):
            console.print(made)
        for remark in self.remarks:
            console.print(f"- {remark}", soft_wrap=True)

    def _head(self) -> list[str]:
        return [*self.index.columns, *self.text.columns]

    def _body(self, bold: Writer, escaped: Writer = str) -> list[list[str]]:
        """The rows' cells, escaped, of the best the figure in bold and not what is in brackets."""
        rows = []
        for position in range(len(self.index)):
            labels = [escaped(label) for label in self.index.iloc[position]]
            cells = zip(self.text.iloc[position], self.best.iloc[position], strict=True)
            rows.append(labels + [_bold(cell, bold, escaped) if best else escaped(cell)
                                  for cell, best in cells])  # fmt: skip
        return rows

    def _latex_head(self) -> tuple[pd.Index, str]:
        """Titles of the columns, and the rules between two rows of them.

        Above the variant, or the figure that is spread; one row where there is nothing to say.
        """
        above, below = [], []
        for column in self.columns:
            variant, name = titles_of(column.key)
            if column.settings:
                variant, name = f"{name}, {variant}", ", ".join(at for _, at in column.settings)
            above.append(latex(variant))
            below.append(latex(name))
        keys = [latex(key) for key in self.index.columns]
        spread = ", ".join(key for key, _ in self.columns[0].settings) if self.columns else ""
        if spread:
            keys[-1] += rf" \textbar{{}} {latex(spread)}"
        if not any(above):
            return pd.Index([*keys, *below]), ""
        rules, start = "", len(keys) + 1
        for title, group in itertools.groupby(above):
            end = start + len(list(group))
            rules += rf"\cmidrule(lr){{{start}-{end - 1}}}" if title else ""
            start = end
        return pd.MultiIndex.from_arrays([[""] * len(keys) + above, [*keys, *below]]), rules


def lay_out(
    made: Pivot, comparisons: Sequence[Comparison] = (), within: Sequence[str] | None = None
) -> Table:
    """A pivot as it is shown: deviations, differences, the best in bold, holes with their reason.

    within: the rows' settings among which the best is told, by default SIZES.
    """
    rows = list(made.rows())
    shown = pd.DataFrame({
        column.name: [_figure(made, number, row, column) for number, row in enumerate(rows)]
        for column in made.columns
    })  # fmt: skip
    text = pd.DataFrame({
        column.name: [
            cell + _brackets(comparisons, column, number) + _how_many(made, row, column)
            for number, (row, cell) in enumerate(zip(rows, shown[column.name], strict=True))
        ]
        for column in made.columns
    })  # fmt: skip
    among = [key for key in (SIZE_KEYS if within is None else within) if key in made.index]
    best = _best(made, among)
    told = list(remarks(made))
    first = [one for one in told if not one.startswith(("the same", "differs"))]
    if best.to_numpy().any():
        alike = f" of each {', '.join(among)}" if among else ""
        first.insert(0, f"bold: the best{alike}, by the mean")
    first[:0] = [one.remark() for one in comparisons if one.difference.notna().any(axis=None)]
    origin = [one for one in told if one not in first]
    numbers = _numbers(made, comparisons)
    return Table(made.index, made.columns, text, best, numbers, tuple(first), tuple(origin))


def _no_formula(cell: Any) -> Any:
    """A cell that no spreadsheet computes; -0.5 stays a number, also as text."""
    if not isinstance(cell, str) or not cell.lstrip(" ").startswith(FORMULA):
        return cell
    return cell if PLAIN_NUMBER.fullmatch(cell) else f"'{cell}"


def latex(text: str) -> str:
    """Text with LaTeX's own characters escaped, and those that pdflatex does not know replaced."""
    return "".join(LATEX.get(letter) or _ascii(letter) for letter in str(text))


def _ascii(letter: str) -> str:
    if letter.isascii():
        return letter
    plain = unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode()
    return "".join(LATEX.get(one, one) for one in plain) or "?"


def _styled(cell: str) -> Text:
    """A cell for the terminal: up to the brackets bold where BOLD begins it."""
    figure, bracket, rest = cell.removeprefix(BOLD).partition(" (")
    return Text.assemble((figure, "bold" if cell.startswith(BOLD) else ""), bracket + rest)


def _bold(cell: str, bold: Writer, escaped: Writer) -> str:
    figure, bracket, rest = cell.partition(" (")
    return bold(escaped(figure)) + escaped(bracket + rest)


def _figure(made: Pivot, number: int, row: tuple[str, ...], column: Column) -> str:
    """Mean ± deviation, or why there is none."""
    mean, deviation = made.mean[column.name][number], made.deviation[column.name][number]
    if mean != mean:
        statuses = made.statuses(row, column)
        if column.key == STATUS and statuses and set(statuses) == {OK}:
            return OK
        return state(statuses)
    shown = figure_text(column.key, mean)
    differ = deviation > EQUAL * abs(mean) and not is_truth(column.key)
    return f"{shown} ± {figure_text(column.key, deviation)}" if differ else shown


def _how_many(made: Pivot, row: tuple[str, ...], column: Column) -> str:
    """Where some reports of a cell failed, of how many its mean is."""
    every, done = made.statuses(row, column), made.finished(row, column)
    failed = [status for status in every if status != OK]
    return f" ({len(done)} of {len(every)})" if done and failed else ""


def _brackets(comparisons: Sequence[Comparison], column: Column, number: int) -> str:
    """The differences of a cell: (−3.7*); to several baselines each in its place: (–; +0.5)."""
    brackets = []
    for one in comparisons:
        value = one.difference[column.name][number]
        if value == value and (abs(value) > EQUAL or len(comparisons) > 1):
            brackets.append(difference_text(column.key, value) + stars(one.p[column.name][number]))
        elif len(comparisons) > 1:
            brackets.append(MISSING)
    return f" ({'; '.join(brackets)})" if set(brackets) - {MISSING} else ""


def _best(made: Pivot, among: Sequence[str]) -> pd.DataFrame:
    """Which cells are the best of their column, among rows alike in these settings.

    None where a single row has a figure or all are shown alike, nor among figures of dense models.
    """
    best = pd.DataFrame(False, index=made.mean.index, columns=made.mean.columns)
    groups: dict[tuple[str, ...], list[int]] = {}
    for number, labels in enumerate(made.index[list(among)].to_numpy().tolist()):
        groups.setdefault(tuple(labels), []).append(number)
    for column in made.columns:
        sign = 0 if column.key.startswith("dense") else better(column.key)
        for rows in groups.values() if sign else ():
            figures = made.mean[column.name].iloc[rows].dropna()
            cells = figures.map(lambda value, key=column.key: figure_text(key, value))
            if cells.nunique() > 1:
                first = cells.iloc[int((sign * figures).to_numpy().argmax())]
                best.loc[list(cells.index[cells == first]), column.name] = True
    return best


def _numbers(made: Pivot, comparisons: Sequence[Comparison]) -> pd.DataFrame:
    """Each mean, and behind it what there is of its deviation, differences and p."""
    columns: dict[str, pd.Series] = {}
    for column in made.columns:
        name = column.name
        columns[name] = made.mean[name]
        further = {f"{name} (std)": made.deviation[name]}
        for one in comparisons:
            further[f"{name} (difference to {one.baseline})"] = one.difference[name]
            further[f"{name} (p to {one.baseline})"] = one.p[name]
        columns |= {key: column for key, column in further.items() if column.notna().any()}
    return pd.DataFrame(columns, index=made.index.index)
