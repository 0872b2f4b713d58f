"""Tables laid out: the best, cells that are not whole, LaTeX."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from running import missing
from tabled import made_of, write

from moe_lab.tables.table import latex


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
