"""What a sweep leaves at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tabled import cells, write

from moe_lab.tables import outputs
from moe_lab.tables.outputs import write_outputs
from moe_lab.tables.pivot import Request


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
