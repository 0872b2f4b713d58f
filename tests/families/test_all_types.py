"""Each type in a process of its own: one that dies is a fault, and ends no other."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moe_lab.families import all_types
from moe_lab.families.all_types import Row
from moe_lab.families.outcome import Outcome


def test_a_row_is_text_and_back() -> None:
    row = Row("mixtral", "AutoModelForCausalLM", {"find": Outcome("fault", "a", "b")}, 1.5)
    assert Row.from_json(row.to_json()) == row


def test_what_counts_as_failed() -> None:
    def failed(state: str) -> bool:
        return Row("a", "b", {"find": Outcome("yes"), "prune": Outcome(state)}).failed  # type: ignore[arg-type]

    assert failed("fault") and failed("silent")
    assert not any(map(failed, ("stock", "own", "refused", "not built", "none")))


def test_a_process_that_dies_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / all_types.OUTPUT).write_text("one\nSegmentation fault\n")
    (outcome,) = all_types._read(tmp_path, -11).values()
    assert outcome.state == "fault"
    assert "-11" in outcome.detail and "Segmentation fault" in outcome.detail


def test_processes_that_die_end_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(all_types, "_work", die)
    rows = {row.name: row for row in all_types.check_types(["mixtral", "olmoe", "jamba"], 2)}
    assert rows.keys() == {"mixtral", "olmoe", "jamba"}
    assert all(
        row.failed and "ended with 3" in row.outcomes["find"].detail for row in rows.values()
    )


def die(name: str, socket: Path, folder: Path) -> None:
    (folder / all_types.OUTPUT).write_text("")
    os._exit(3)
