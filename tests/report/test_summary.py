"""The tables of a report that a person can read."""

from __future__ import annotations

from io import StringIO

from example_report import REPORT
from rich.console import Console

from moe_lab.report.summary import (
    result_markdown,
    result_rows,
    result_table,
    stage_rows,
    stages_table,
)


def shown(table: object) -> str:
    out = StringIO()
    Console(file=out, width=200).print(table)
    return out.getvalue()


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
