"""Published figures beside ours: what matches what, and what is within tolerance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_lab.report.frame import read_reports
from moe_lab.report.report import write_report
from moe_lab.tables.expected import compare_to_published
from moe_lab.tables.outputs import write_outputs
from moe_lab.tables.pivot import Request
from moe_lab.tables.table import Table
from moe_lab.types import UserError

FILE = """\
table,variant,model,method,condense/num_layers,figure,value,std,tolerance,provenance,note
main,dense,big,,,dense/eval/average,0.616,,0.01,PAGE,
main,cd_moe_s,big,condense,3,compressed/eval/average,0.5919,0.002,0.01,SHEET,
main,cd_moe_s,big,condense,6.0,compressed/eval/average,0.60,,0.01,SHEET,
main,cd_moe_s,big,condense,6,compressed/kl,0.5,,,SHEET,no tolerance
main,cd_moe_s,big,condense,9,compressed/eval/average,0.545,,0.01,SHEET,never run
main,drop,big,none,,compressed/eval/average,0.4,,0.01,SHEET,
main,cd_moe_s,other,condense,3,compressed/eval/average,0.5,,0.01,SHEET,
main,cd_moe_s,big,condense,3,perplexity,12.0,,,SHEET,
"""
GIVEN = (
    {"method": "condense", "condense/num_layers": 3, "seed": 0, "compressed/eval/average": 0.59},
    {"method": "condense", "condense/num_layers": 3, "seed": 1, "compressed/eval/average": 0.60},
    {"method": "condense", "condense/num_layers": 6, "seed": 0, "compressed/eval/average": 0.58,
     "compressed/kl": 0.25},
    {"method": "condense", "condense/num_layers": 9, "seed": 0, "status": "failed",
     "compressed/eval/average": 0.9},
)  # fmt: skip


def compared(tmp_path: Path, text: str = FILE) -> Table:
    for number, one in enumerate(GIVEN):
        (tmp_path / str(number)).mkdir(exist_ok=True)
        base = {"status": "ok", "error": None, "model": "big", "dense/eval/average": 0.612}
        write_report(tmp_path / str(number), base | one)
    (tmp_path / "expected.csv").write_text(text)
    return compare_to_published(read_reports(tmp_path), tmp_path / "expected.csv")


def test_ours_stands_beside_what_matches(tmp_path: Path) -> None:
    made = compared(tmp_path)
    assert made.index["figure"].tolist() == [
        "dense/eval/average", "compressed/eval/average", "compressed/eval/average",
        "compressed/kl",
    ]  # fmt: skip
    assert made.text.to_numpy().tolist() == [
        ["61.6 %", "61.2 %", "−0.4", "±1.0", "yes"],
        ["59.2 % ± 0.2 %", "59.5 % ± 0.7 %", "+0.3", "±1.0", "yes"],
        ["60.0 %", "58.0 %", "−2.0", "±1.0", "NO"],
        ["0.5000", "0.2500", "−0.2500", "–", "–"],
    ]
    assert made.numbers["difference"].round(4).tolist() == [-0.004, 0.0031, -0.02, -0.25]
    assert made.numbers["note"].iloc[3] == "no tolerance"


def test_what_is_lacking_is_counted(tmp_path: Path) -> None:
    notes = compared(tmp_path).notes
    assert notes[0].startswith("4 figures of expected.csv beside ours: 2 of the 3 with")
    assert set(notes[1:]) == {
        "further rows, 2, were not run",
        "further rows, 1, are of other, which was not run",
        "further rows, 1, are no figures of reports",
    }


def test_all_formats(tmp_path: Path) -> None:
    made = compared(tmp_path)
    assert "| main | cd_moe_s | condense | 6.0 | compressed/eval/average | 60.0 % |" in (
        made.markdown()
    )
    assert made.markdown().endswith("- of all: model=big\n"), "what is alike is told once"
    assert made.csv().splitlines()[0] == (
        "table,variant,method,condense/num_layers,figure,value,std,ours,ours (std),"
        "difference,tolerance,within,provenance,note,model"
    )
    assert r"$-$2.0" in made.latex()


def test_nothing_to_compare_is_a_table_without_rows(tmp_path: Path) -> None:
    made = compared(tmp_path, "figure,value,model\ncompressed/kl,1,unknown\n")
    assert len(made.index) == 0
    assert "further rows, 1, are of unknown, which was not run" in made.markdown()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model,value\nbig,1\n", "no column 'figure'"),
        ("figure,model\nx,1\n", "no column 'value'"),
        ("figure,value\nx,12 %\n", "'12 %' in column value is no number"),
        ("", "cannot be read as a CSV file"),
    ],
)
def test_a_wrong_file_is_explained(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        compared(tmp_path, text)


def test_a_figure_without_a_report_of_it_is_not_made_up(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    found: dict[str, Any] = {"status": "ok", "model": "big", "compressed/kl": None}
    write_report(tmp_path / "0", found)
    (tmp_path / "e.csv").write_text("figure,value\ncompressed/kl,1\n")
    made = compare_to_published(read_reports(tmp_path), tmp_path / "e.csv")
    assert made.notes[1] == "further rows, 1, were not evaluated or measured"


def test_a_sweep_shows_what_is_not_within_tolerance(tmp_path: Path) -> None:
    compared(tmp_path)
    asked = Request(expected=str(tmp_path / "expected.csv"))
    paths, (_, shown) = write_outputs(tmp_path, asked)
    assert shown.text["within"].tolist() == ["NO", "–"]
    assert {"expected.md", "expected.csv", "expected.tex"} <= {path.name for path in paths}
    assert "| yes |" in (tmp_path / "expected.md").read_text(), "the file has all"


def test_an_experiment_s_file_is_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared(tmp_path)
    monkeypatch.chdir(tmp_path)
    made = compare_to_published(read_reports(tmp_path), Path("cd_moe/main_table/expected.csv"))
    assert len(made.index) == 0 and "deepseek_moe_16b, which was not run" in str(made.notes)
