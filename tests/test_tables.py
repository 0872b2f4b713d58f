"""Tables: pivots of reports that the report module wrote, against means computed by hand."""

from __future__ import annotations

import csv
import io
import math
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import missing

from moe_lab.report.figures import MISSING
from moe_lab.report.frame import read_reports
from moe_lab.report.report import write_report
from moe_lab.tables import outputs
from moe_lab.tables.__main__ import main
from moe_lab.tables.outputs import make_table, write_outputs
from moe_lab.tables.pivot import Request
from moe_lab.tables.table import Table, latex
from moe_lab.types import UserError

ACCURACY = {(2, 0): 0.80, (2, 1): 0.83, (2, 2): 0.79, (4, 0): 0.60, (4, 1): 0.71, (4, 2): 0.64}


def write(folder: Path, number: int, **given: Any) -> None:
    one = {"status": "ok", "error": None, "model": "tiny", "method": "condense"}
    one |= {key.replace("__", "/"): value for key, value in given.items()}
    one |= {"commit": "abc", "sweep": "s", "job": f"job {number}"}
    (folder / str(number)).mkdir(parents=True)
    write_report(folder / str(number), one)


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two experts options, two numbers of layers; random has three seeds, one job failed."""
    folder = tmp_path / "sweep"
    for number, ((layers, seed), accuracy) in enumerate(ACCURACY.items()):
        write(folder, number, condense__experts="random", condense__num_layers=layers,
              condense__seed=seed, dense__eval__average=0.9, compressed__eval__average=accuracy,
              compressed__kl=layers / 10, dense__parameters=1000, compressed__parameter_ratio=0.75,
              compressed__prefill_speedup=1.25)  # fmt: skip
    write(folder, 6, condense__experts="l1", condense__num_layers=2, condense__seed=0,
          dense__eval__average=0.9, compressed__eval__average=0.7)  # fmt: skip
    write(folder, 10, condense__experts="l1", condense__num_layers=4, condense__seed=0,
          status="failed", error="too many\nlayers | 4", dense__eval__average=0.9)  # fmt: skip
    return folder


def made_of(folder: Path, **request: Any) -> Table:
    return make_table(read_reports(folder), Request(**request))


def parsed(table: Table) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(table.csv())))


def cells(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_rows_are_what_differs_and_seeds_are_averaged(sweep: Path) -> None:
    made = made_of(sweep)
    rows = parsed(made)
    keys = ["condense/experts", "condense/num_layers"]
    assert [[row[key] for key in keys] for row in rows] == [
        ["random", "2"], ["random", "4"], ["l1", "2"], ["l1", "4"],
    ]  # fmt: skip
    for row, layers in zip(rows, (2, 4), strict=False):
        found = [value for (one, _), value in ACCURACY.items() if one == layers]
        mean = sum(found) / 3
        deviation = math.sqrt(sum((value - mean) ** 2 for value in found) / 2)
        assert float(row["compressed/eval/average"]) == pytest.approx(mean, abs=1e-9)
        assert float(row["compressed/eval/average (std)"]) == pytest.approx(deviation, abs=1e-9)
        assert deviation == pytest.approx(statistics.stdev(found))
        assert row["compressed/parameter_ratio"] == "0.75"
    assert rows[2]["compressed/eval/average"] == "0.7"
    assert rows[2]["compressed/eval/average (std)"] == ""
    assert rows[2]["compressed/kl"] == ""
    head, _, *body = cells(made.markdown())
    at = head.index("compressed/eval/average")
    assert [row[at] for row in body] == [
        "**80.7 % ± 2.1 %**", "65.0 % ± 5.6 %", "70.0 %", "failed",
    ]  # fmt: skip
    assert body[0][head.index("compressed/prefill_speedup")] == "1.25×"
    assert body[0][head.index("compressed/kl")] == "0.2000"
    assert body[2][head.index("compressed/kl")] == MISSING


def test_a_failed_job_is_told_and_gives_no_number(sweep: Path) -> None:
    made = made_of(sweep)
    last = parsed(made)[-1]
    assert last["dense/eval/average"] == "", "what a failed job left is no result"
    text = made.markdown()
    told = "- failed: condense/experts=l1, condense/num_layers=4: too many layers | 4\n"
    assert told in text
    assert "over condense/seed=0,1,2\n" in text
    assert "same in all 8 reports that have it: model=tiny; method=condense; commit=abc\n" in text


def test_what_is_mixed_in_a_cell_is_told(sweep: Path) -> None:
    text = made_of(sweep, rows=["condense/num_layers"]).markdown()
    assert "- cells also mix condense/experts=random,l1\n" in text
    narrow = made_of(sweep, rows=["model"], filters={"condense/seed": ["0"]}).markdown()
    assert "condense/seed=0;" in narrow and "± sample" not in narrow
    layers = sweep.parent / "layers"
    write(layers, 0, condense__num_layers=2, seed=0)
    write(layers, 1, condense__num_layers=4, seed=1)
    text = made_of(layers).markdown()
    assert "- differs between cells seed=0,1\n" in text
    assert cells(text)[2:] == [["2", "ok"], ["4", "ok"]], "no figures, but it is known how it went"


def test_columns_spread_a_setting(sweep: Path) -> None:
    made = made_of(sweep, columns=["condense/num_layers"], values=["compressed/eval/average"])
    head, _, *body = cells(made.markdown())
    assert head == ["condense/experts"] + [
        f"compressed/eval/average (condense/num_layers={layers})" for layers in (2, 4)
    ]
    assert body == [
        ["random", "**80.7 % ± 2.1 %**", "65.0 % ± 5.6 %"],
        ["l1", "70.0 %", "failed"],
    ]
    write(sweep, 11, condense__experts="frequency", condense__num_layers=2, condense__seed=0,
          compressed__eval__average=0.5)  # fmt: skip
    made = made_of(sweep, columns=["condense/num_layers"], values=["compressed/eval/average"])
    assert cells(made.markdown())[-1] == ["frequency", "50.0 %", MISSING], "never asked for"


def test_filters(sweep: Path) -> None:
    made = made_of(sweep, filters={"condense/experts": ["l1"], "status": ["ok", "x"]})
    assert len(parsed(made)) == 1
    with pytest.raises(UserError, match=r"no report has condense/seed=7 and model=tiny"):
        made_of(sweep, filters={"condense/seed": ["7"], "model": ["tiny"]})


def test_jobs_come_in_their_own_order(tmp_path: Path) -> None:
    for number in (10, 9, 1):
        write(tmp_path, number, condense__num_layers=number, compressed__kl=0.1)
    assert list(read_reports(tmp_path)["condense/num_layers"]) == [1, 9, 10]


def test_settings_of_another_method(tmp_path: Path) -> None:
    """What only one method has makes rows where it differs, and is otherwise told below."""
    for number, routed in enumerate((0, 4)):
        write(tmp_path, number, condense__num_routed=routed, condense__beam=1, compressed__kl=0.1,
              plan__layers="[1, 2]")  # fmt: skip
    write(tmp_path, 2, method="drop_layers", compressed__kl=0.3, plan__layers="[5]")
    made = made_of(tmp_path)
    rows = [list(row.values()) for row in parsed(made)]
    assert rows == [
        ["condense", "0", "0.1"], ["condense", "4", "0.1"], ["drop_layers", "none", "0.3"],
    ]  # fmt: skip
    assert "condense/beam=1" in made.remarks[-1]


def run(*given: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "moe_lab.tables", *given]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_command(sweep: Path, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    only = ["--filter", "condense/experts=random,l1", "--filter", "condense/num_layers=2"]
    done = run(str(sweep), *only, "--values", "compressed/kl", "--rows", "condense/experts",
               "--format", "csv", "--output", str(path))  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert path.read_text().splitlines() == [
        "condense/experts,compressed/kl,compressed/kl (std)", "random,0.2,0", "l1,,",
    ]  # fmt: skip
    wide = run(str(sweep), "--columns", "condense/num_layers")
    expected = made_of(sweep, columns=["condense/num_layers"]).markdown()
    assert (wide.returncode, wide.stdout) == (0, expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--rows", "condense/expert"], "settings are model, method, condense/experts"),
        (["--values", "compressed/kll"], "results are status, error"),
        (["--values", "model"], "model is no number in any report"),
        (["--rows", "model", "--columns", "model"], "in --rows or in --columns, not in both"),
        (["--write", "--output", "x.md"], "leave out --output and --format"),
        (["--expected", "x.csv", "--rows", "model"], "--expected is a table of its own"),
        (["--output", "x.txt"], "it ends in .md, .csv, .tex, or say --format"),
        (["--filter", "model"], "'model' is not KEY=VALUE"),
        (["--filter", "model=other"], "no report has model=other"),
        (["--baseline", "metric=random"], "it is dense, or key=value of condense/experts"),
        (
            ["--baseline", "condense/experts=x"],
            "no report has condense/experts=x; condense/experts",
        ),
        (["--sort", "x"], "the table has no 'x'"),
        (["--expected", "no/such.csv"], "no/such.csv is not there"),
        (["--output", "no/such/folder/table.md"], "no/such/folder/table.md"),
    ],
)
def test_a_wrong_request_is_explained(
    sweep: Path, given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main([str(sweep), *given])
    except SystemExit as left:  # argparse leaves by itself
        code = left.code
    printed = capsys.readouterr()
    assert (code, printed.out) == (2, "")
    assert message in printed.err


@pytest.mark.parametrize("name", ["empty", "missing"])
def test_no_reports(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / name)]) == 2
    assert f"{tmp_path / name} holds no report.json" in capsys.readouterr().err


def test_all_of_a_sweep_is_written_also_when_all_of_it_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(2):
        write(tmp_path, number, ratio=number, status="failed", error=f"reason {number}")
    paths, (table,) = write_outputs(tmp_path, Request())
    written = {path.name for path in paths}
    table.show()
    shown = capsys.readouterr().out
    assert "reason 0" in shown and "reason 1" in shown
    assert written == {"table.md", "table.csv", "table.tex", "index.html"}
    assert cells((tmp_path / "table.md").read_text())[2:] == [["0", "failed"], ["1", "failed"]]
    assert (tmp_path / "table.csv").read_text() == "ratio,status\n0,\n1,\n"
    assert not caplog.records


def test_a_part_that_cannot_be_made_costs_no_other(
    sweep: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(outputs, "draw_sweep", broken)
    written, shown = write_outputs(sweep, Request(values=["error"], expected="no/such.csv"))
    assert ([path.name for path in written], shown) == (["index.html"], [])
    assert "no table: error is no number in any report" in caplog.text
    assert "no comparison: no/such.csv is not there" in caplog.text
    assert "no pictures" in caplog.text and "ZeroDivisionError" in caplog.text


def test_a_sweep_s_table_leaves_out_what_its_jobs_did_not_give(
    sweep: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What a sweep is to show is asked for before it runs: measure=none must not cost the table."""
    asked = Request(
        rows=["condense/experts", "merge/router"], values=["compressed/bytes", "compressed/kl"],
        baseline=["dense", "metric=random"],
    )  # fmt: skip
    _, (table,) = write_outputs(sweep, asked)
    assert list(table.index) == ["condense/experts"]
    assert [column.key for column in table.columns] == ["compressed/kl"]
    assert "leaves out what no report has: merge/router, compressed/bytes, metric=random" in (
        caplog.text
    )
    nothing, _ = write_outputs(sweep, Request(values=["compressed/bytes"]))
    assert "table.md" in {path.name for path in nothing}, "the usual figures instead"


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


def test_rows_can_be_sorted(sweep: Path) -> None:
    by_figure = made_of(sweep, sort=["-compressed/eval/average"])
    assert by_figure.numbers["compressed/eval/average"].round(3).tolist()[:3] == [0.807, 0.7, 0.65]
    assert by_figure.text["compressed/eval/average"].iloc[-1] == "failed"
    by_setting = made_of(sweep, sort=["-condense/num_layers", "condense/experts"])
    assert by_setting.index.to_numpy().tolist() == [
        ["l1", "4"], ["random", "4"], ["l1", "2"], ["random", "2"],
    ]  # fmt: skip
    spread = made_of(sweep, columns=["condense/num_layers"], sort=["compressed/eval/average"],
                     values=["compressed/eval/average"])  # fmt: skip
    assert spread.index["condense/experts"].tolist() == ["l1", "random"], "70.0 %, 80.7 %"
    with pytest.raises(UserError, match="--sort ratio: the table has no 'ratio'; it has condense"):
        made_of(sweep, sort=["ratio"])


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


def test_a_sweep_s_end_can_be_made_again(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the table that the sweep was asked for, where the command does not ask for another."""
    (sweep / "multirun.yaml").write_text(
        "table:\n  _target_: moe_lab.tables.pivot.Request\n  rows: ['${key}']\n  values: null\n"
        "key: condense/experts\n"
    )
    assert main([str(sweep), "--write"]) == 0
    assert str(sweep / "index.html") in capsys.readouterr().out.splitlines()
    assert cells((sweep / "table.md").read_text())[0][:2] == [
        "condense/experts", "dense/eval/average",
    ]  # fmt: skip
    assert main([str(sweep), "--write", "--values", "compressed/kl"]) == 0
    assert cells((sweep / "table.md").read_text())[0] == [
        "condense/experts", "condense/num_layers", "compressed/kl",
    ]  # fmt: skip


def test_jobs_that_no_setting_tells_apart_are_rows_of_their_own(tmp_path: Path) -> None:
    """An option that some have not at all, and one that reports do not tell; seeds are averaged."""
    request = "fingerprint__request"
    for number, (top_k, seed) in enumerate([(None, 0), (None, 1), (1, 0), (1, 1)]):
        write(tmp_path, number, finetune__top_k=top_k, seed=seed, compressed__kl=number / 10,
              **{request: f"r{number}"})  # fmt: skip
    made = made_of(tmp_path)
    assert [list(row.values())[:2] for row in parsed(made)] == [["none", "0.05"], ["1", "0.25"]]
    write(tmp_path, 4, finetune__top_k=1, seed=1, compressed__kl=0.9, **{request: "r4"})
    assert {row["job"] for row in parsed(made_of(tmp_path))} == {f"job {one}" for one in range(5)}


def test_the_same_job_in_two_folders_is_one(tmp_path: Path) -> None:
    for number, (seed, kl) in enumerate([(0, 0.1), (1, 0.2), (1, 0.2), (1, 0.2)]):
        write(tmp_path, number, seed=seed, compressed__kl=kl, fingerprint__request=f"r{seed}",
              status="failed" if number == 3 else "ok")  # fmt: skip
    made = made_of(tmp_path)
    assert made.numbers["compressed/kl (std)"].tolist() == [
        pytest.approx(statistics.stdev([0.1, 0.2]))
    ]
    assert "left out, the same job as another report: 1, 3" in made.remarks


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


def test_a_report_that_is_none_is_named(tmp_path: Path) -> None:
    for content in ("{", "[]", "{}"):
        (tmp_path / "report.json").write_text(content)
        assert main([str(tmp_path)]) == 2
