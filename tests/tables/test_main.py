"""`python -m moe_lab.tables`: what it writes, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tabled import cells, made_of

from moe_lab.tables.__main__ import main


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


def test_a_report_that_is_none_is_named(tmp_path: Path) -> None:
    for content in ("{", "[]", "{}"):
        (tmp_path / "report.json").write_text(content)
        assert main([str(tmp_path)]) == 2
