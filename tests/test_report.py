"""The report: flat JSON in and out, and tables a person can read."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from moe_lab.report.report import read_report, write_report
from moe_lab.report.summary import (
    result_markdown,
    result_rows,
    result_table,
    stage_rows,
    stages_table,
)

REPORT = {
    "status": "ok",
    "model": "tiny_deepseek",
    "ratio": None,
    "seed": 0,
    "dense/parameters": 12_345_678,
    "dense/active_parameters": 999_990,
    "dense/bytes": 12_300_000,
    "dense/memory_ratio": 1.0,
    "dense/prefill_speedup": 1.0,
    "dense/stock": True,
    "dense/eval/code/acc_stderr": 0.02,
    "dense/eval/code/acc": 0.8125,
    "dense/eval/code/acc_norm": 0.75,
    "dense/eval/prose_perplexity/word_perplexity": 40.0,
    "dense/eval/prose_perplexity/bits_per_byte": 1.25,
    "dense/eval/average": 0.75,
    "compressed/parameters": 950,
    "compressed/bytes": 999,
    "compressed/memory_ratio": 0.85,
    "compressed/prefill_speedup": 1.2149,
    "compressed/kl": 0.01234,
    "compressed/stock": False,
    "compressed/eval/code/acc": 0.7,
    "compressed/eval/code/acc_norm": 0.625,
    "compressed/eval/prose_perplexity/bits_per_byte": math.nan,
    "compressed/eval/average": 0.7501,
    "seconds/profile": 12.34,
    "cached/profile": True,
    "seconds/evaluate/dense": 3.0,
    "cached/evaluate/dense": False,
}


def shown(table: object) -> str:
    out = StringIO()
    Console(file=out, width=200).print(table)
    return out.getvalue()


def test_written_and_read_in_order(tmp_path: Path) -> None:
    path = write_report(tmp_path, REPORT)
    assert path == tmp_path / "report.json"
    found = read_report(tmp_path)
    assert list(found) == list(REPORT)
    assert found["compressed/eval/prose_perplexity/bits_per_byte"] is None
    assert found["dense/parameters"] == 12_345_678
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_infinity_is_null_and_json_stays_strict(tmp_path: Path) -> None:
    path = write_report(tmp_path, {"a": math.inf, "b": -math.inf, "c": 1.5})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    values = json.loads(path.read_text(), parse_constant=refuse)
    assert values == {"a": None, "b": None, "c": 1.5}


def test_nested_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"report\['dense/eval'\] is a dict"):
        write_report(tmp_path, {"dense/eval": {"code": 1}})
    assert not list(tmp_path.iterdir())


def test_rows() -> None:
    assert result_rows(REPORT) == [
        ["", "dense", "compressed"],
        ["code (acc_norm)", "75.0 %", "62.5 % (−12.5)"],
        ["prose_perplexity (bits_per_byte)", "1.250", "–"],
        ["average accuracy", "75.0 %", "75.0 % (0.0)"],
        ["KL to dense (nats per token)", "–", "0.0123"],
        ["parameters", "12.3 M", "950"],
        ["active parameters", "1.0 M", "–"],
        ["size on disk", "12.3 MB", "999 B"],
        ["peak memory of a forward", "100.0 %", "85.0 %"],
        ["prefill speed", "1.00×", "1.21×"],
        ["loads in stock transformers", "yes", "no"],
    ]


def test_a_better_score_has_a_plus() -> None:
    better = {"dense/eval/average": 0.5, "finetuned/eval/average": 0.521}
    assert result_rows(better)[1] == ["average accuracy", "50.0 %", "52.1 % (+2.1)"]


def test_a_failed_report_has_a_table_too() -> None:
    assert result_rows({"status": "failed", "error": "x"}) == [[""]]
    assert shown(result_table({"status": "failed"})) is not None


def test_stages() -> None:
    assert stage_rows(REPORT) == [
        ["stage", "took", "cached"],
        ["profile", "12.3 s", "yes"],
        ["evaluate/dense", "3.0 s", "no"],
    ]


def test_terminal_and_markdown_say_the_same() -> None:
    terminal, text = shown(result_table(REPORT)), result_markdown(REPORT)
    lines = text.splitlines()
    assert lines[0] == "|  | dense | compressed |"
    assert lines[1] == "| --- | ---: | ---: |"
    for row in result_rows(REPORT):
        assert f"| {' | '.join(row)} |" in lines
        assert all(cell in terminal for cell in row)
    assert "12.3 s" in shown(stages_table(REPORT))


def test_import_is_light() -> None:
    program = "import sys, moe_lab.report.report; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert answer.stdout.strip() == "False", answer.stderr
