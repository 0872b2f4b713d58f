"""The command: its files, and what it refuses without a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from families import tiny_model
from traced import traced

from moe_lab.offload.__main__ import main


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return traced(tiny_model("qwen2_moe"), tmp_path_factory.mktemp("trace")).path


def test_tables_and_files(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    given = [str(trace.parent), "--experts", "6,12", "--policy", "lru,min", "--policy",
             "hobbit:t1=0.5", "--output", str(tmp_path / "out"), "--bandwidth", "2"]  # fmt: skip
    assert main(given) == 0
    shown = capsys.readouterr().out
    assert "hobbit:t1=0.5" in shown and "lru" in shown and "%" in shown
    assert "…" not in shown, "80 columns hold every digit"
    frame = pd.read_csv(tmp_path / "out" / "offload.csv")
    told = json.loads((tmp_path / "out" / "offload.json").read_text())
    assert len(frame) == len(told["rows"]) == 6 and told["trace"]["model"] == "0123456789ab"
    assert told["asked"]["bandwidth"] == 2.0
    assert frame["decode/hit_rate"].between(0, 1).all()
    assert (tmp_path / "out" / "offload.png").is_file()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--experts", "2"], "a token needs 3 of one layer at once"),
        (["--experts", "8", "--cache", "per-layer"], "a cache for each of 3 layers 9"),
        (["--memory", "1e-9"], "no expert fits beside it"),
        (["--experts", "6", "--bandwidth", "0"], "--bandwidth 0: it must be above 0"),
        (["--experts", "6", "--layer-us", "nan"], "--layer-us nan"),
        (["--experts", "0"], "--experts 0: it must be above 0"),
        (["--experts", "6", "--bits", "4", "--expert-bytes", "9"], "give one"),
        (["--experts", "6", "--policy", "fifo"], "'fifo' does not exist"),
        (["--experts", "6", "--model", "shipped:tiny_mixtral"], "a trace of another model"),
    ],
)
def test_refusals(
    trace: Path, given: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(trace), *given]) == 2
    assert words in capsys.readouterr().err


def test_a_file_that_is_no_trace_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.parquet").write_text("no")
    assert main([str(tmp_path / "a.parquet"), "--experts", "6"]) == 2
    assert "is no trace" in capsys.readouterr().err
    assert main([str(tmp_path / "b.parquet"), "--experts", "6"]) == 2
    assert "there is no trace at" in capsys.readouterr().err
