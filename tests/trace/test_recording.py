"""Traces are written part by part: a killed one goes on, and gives what one at a stretch does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from running import Killed
from traced import PROMPTS, header, traced

from moe_lab.trace import recording
from moe_lab.trace.file import read_trace
from moe_lab.trace.recording import continue_greedily, generated_together, record
from moe_lab.types import UserError


def test_a_killed_trace_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("mixtral")
    whole = traced(model, tmp_path / "whole", _made(tmp_path / "whole"))
    folder, written = tmp_path / "killed", []

    def killed(table: Any, path: Path) -> None:
        if written:
            (folder / "part-000001.parquet").write_bytes(b"half a part")
            raise Killed
        written.append(path)
        write(table, path)

    write = recording.write_part
    monkeypatch.setattr(recording, "write_part", killed)
    folder.mkdir()
    with pytest.raises(Killed):
        record(model, PROMPTS, header(model), folder)
    monkeypatch.setattr(recording, "write_part", write)
    runs: list[int] = []
    generate = recording.continue_greedily
    monkeypatch.setattr(
        recording, "continue_greedily", lambda *given: (runs.append(1), generate(*given))[1]
    )
    record(model, PROMPTS, header(model), folder)
    assert len(runs) == 2, "the first request is not generated again"
    assert read_trace(folder).path.read_bytes() == whole.path.read_bytes()
    assert [path.name for path in folder.iterdir()] == ["trace.parquet"]


def _made(folder: Path) -> tuple[tuple[int, ...], ...]:
    folder.mkdir()
    return PROMPTS


def test_requests_of_one_length_are_generated_together(tmp_path: Path) -> None:
    assert generated_together([(1,), (1, 2), (3,), (4,)], 2) == [[0, 2], [1], [3]]
    model = tiny_model("qwen2_moe")
    (tmp_path / "two").mkdir()
    one = traced(model, tmp_path).table.to_pylist()
    two = traced(model, tmp_path / "two", batch_size=2).table.to_pylist()
    key = ("request", "step", "layer", "position")
    by_key = {tuple(row[name] for name in key): row for row in two}
    assert len(by_key) == len(one) == len(two)
    for row in one:
        other = by_key[tuple(row[name] for name in key)]
        assert other["experts"] == row["experts"] and other["tokens"] == row["tokens"]
        assert other["weights"] == pytest.approx(row["weights"], abs=1e-5)
    assert {row["pass"] for row in two} == set(range(10)), "two groups of five passes"


def test_a_family_that_cannot_generate_is_refused() -> None:
    model = tiny_model("mixtral")

    def broken(*given: object, **named: object) -> None:
        raise ValueError("no cache")

    model.generate = broken
    with pytest.raises(UserError, match=r"trace=full: .*does not generate \(no cache\)"):
        continue_greedily(model, torch.tensor([[1, 2]]), 3)
