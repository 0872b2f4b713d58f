"""The report: flat JSON in and out."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from example_report import REPORT

from moe_lab.report.report import read_report, write_report


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


def test_import_is_light() -> None:
    program = "import sys, moe_lab.report.report; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert answer.stdout.strip() == "False", answer.stderr
