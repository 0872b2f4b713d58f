"""Tables laid out: the best, cells that are not whole, LaTeX."""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
from pathlib import Path

import pytest
from running import missing
from tabled import made_of, write

from moe_lab.tables.table import latex

FORMULAS = [
    "=1+1", '=HYPERLINK("http://x","y")', "+1+cmd|' /C calc'!A0", "-2+3", "@SUM(1)", "\t=1", "\r=1",
    "\n=1", " =1", "\uff1d1+1", "-", "=", "--5", "-0.5x",
]  # fmt: skip
NUMBERS = ["-0.5", "-3", "+2", "1e-5", "-1.5e3", "-inf", "nan", "0.25", "a=b", "[x]", "l1"]


def test_the_best_is_told_among_rows_of_one_size(sweep: Path) -> None:
    """By default of one model and one number of layers; ties as shown are bold alike."""
    write(sweep, 11, condense__experts="tie", condense__num_layers=2, condense__seed=0,
          dense__eval__average=0.9, compressed__eval__average=0.80668,
          compressed__kl=0.3)  # fmt: skip
    made = made_of(sweep)
    best = made.best["compressed/eval/average"].tolist()
    assert best == [True, False, False, False, True], "80.7 % twice, and nothing at 4 layers"
    assert made.best["compressed/kl"].tolist() == [True, False, False, False, False], "the least"
    assert not made.best["dense/eval/average"].any()
    assert made.remarks[0] == "bold: the best of each condense/num_layers, by the mean"
    over_all = made_of(sweep, best=[])
    assert over_all.remarks[0] == "bold: the best, by the mean"


def test_a_cell_says_of_how_many_it_is_where_some_failed(sweep: Path) -> None:
    write(sweep, 12, condense__experts="l1", condense__num_layers=2, condense__seed=1,
          status="failed", error="out of memory")  # fmt: skip
    write(sweep, 13, condense__experts="l1", condense__num_layers=4, condense__seed=1,
          status="running")  # fmt: skip
    made = made_of(sweep)
    assert made.text["compressed/eval/average"].tolist()[2:] == ["70.0 % (1 of 2)", "failed"]
    assert "unfinished: condense/experts=l1, condense/num_layers=4: it has not ended" in str(
        made.remarks
    )


@pytest.mark.parametrize("text", FORMULAS + NUMBERS)
def test_no_cell_of_a_csv_file_is_a_formula(text: str, tmp_path: Path) -> None:
    """Neither label nor head nor note: a spreadsheet shows it; numbers stay numbers."""
    for number, name in enumerate((text, "other")):
        write(tmp_path, number, metric=name, seed=number, compressed__kl=-0.5 - number)
    head, *rows = csv.reader(io.StringIO(made_of(tmp_path, rows=["metric"]).csv()))
    cell = next(row[0] for row in rows if row[0] != "other")
    assert cell == (f"'{text.strip()}" if text in FORMULAS else text)
    assert {float(row[head.index("compressed/kl")]) for row in rows} == {-0.5, -1.5}


def test_heads_of_a_csv_file_are_no_formulas(tmp_path: Path) -> None:
    for number in range(2):
        values = {"=cmd": number, "metric": "a", "compressed/kl": 0.5 + number}
        write(tmp_path, number, **values)
    assert made_of(tmp_path, rows=["=cmd"]).csv().startswith("'=cmd,")


@pytest.mark.parametrize("text", ["a\nb", "a\r\n\\input{/etc/passwd}", "a\u2028b\x0bc", "a\n\nb"])
def test_text_of_several_lines_stays_in_its_row(text: str, tmp_path: Path) -> None:
    """A line's end would end a row, or the comment in which LaTeX is told what is the same."""
    for number, name in enumerate((text, "other")):
        write(tmp_path, number, metric=name, ratio=text, compressed__kl=0.5 + number)
    made = made_of(tmp_path, rows=["metric"])
    plain = made_of(tmp_path / "1", rows=["metric"])
    assert len(made.markdown().splitlines()) == len(plain.markdown().splitlines()) + 2
    lines = made.latex().splitlines()
    assert not any(line.lstrip().startswith(("\\input", "b")) for line in lines)


def test_latex_has_every_cell_and_compiles(sweep: Path, tmp_path: Path) -> None:
    write(sweep, 14, condense__experts="[50%_of & #{all}~^\\ $x$ ± μ漢", condense__num_layers=2,
          condense__seed=0, dense__eval__average=0.9, compressed__eval__average=0.1)  # fmt: skip
    plain = made_of(sweep, baseline=["dense", "condense/experts=l1"])
    spread = made_of(sweep, columns=["condense/num_layers"], rows=["condense/experts"])
    text = plain.latex()
    assert r"\textbf{80.7 \% $\pm$ 2.1 \%} ($-$9.3{*}; +10.7)" in text
    assert r"{[}50\%\_of \& \#\{all\}\textasciitilde{}" in text and text.isascii()
    assert r"\multicolumn{2}{c}{average accuracy, compressed}" in spread.latex()
    body = "\n".join([
        r"\documentclass{article}\usepackage{booktabs,graphicx}\begin{document}",
        text, spread.latex(),
        r"\end{document}",
    ])  # fmt: skip
    (tmp_path / "paper.tex").write_text(body)
    compiler = next(filter(shutil.which, ("pdflatex", "tectonic")), None)
    if compiler is None:
        missing("no pdflatex or tectonic: apt-get install texlive-latex-recommended")
    options = ["-halt-on-error", "-interaction=nonstopmode"] if compiler == "pdflatex" else []
    done = subprocess.run(
        [compiler, *options, "paper.tex"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "paper.pdf").read_bytes().startswith(b"%PDF")


def test_latex_escapes_what_pdflatex_does_not_know() -> None:
    assert latex("é≤漢") == r"e$\le$?"


def test_values_with_commas_and_truths(tmp_path: Path) -> None:
    for number, stock in enumerate((True, False, False)):
        write(tmp_path, number, calibration__domains='["prose", "code"]', seed=number,
              compressed__stock=stock, compressed__kl=0.1)  # fmt: skip
    write(tmp_path, 3, calibration__domains='["prose"]', seed=0, compressed__kl=0.3,
          compressed__stock=True)  # fmt: skip
    both, rows = '["prose", "code"]', ["calibration/domains"]
    made = made_of(tmp_path, filters={rows[0]: both.split(",")}, rows=rows * 2)
    assert made.index.to_numpy().tolist() == [[both]]
    made = made_of(tmp_path, baseline=[f"{rows[0]}={both}", "dense"],
                   values=["compressed/kl", "compressed/stock"])  # fmt: skip
    assert made.text["compressed/stock"].tolist() == ["33 % yes", "yes"]
    assert made.text["compressed/kl"].tolist() == ["0.1000", "0.3000 (+0.2000; –)"]
