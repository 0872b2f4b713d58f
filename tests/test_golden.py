"""Whole runs give what they gave: the default run, and three sweeps over all that a job does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from golden import COMMANDS, FIGURES, run
from running import missing

GOLDEN: dict[str, dict[str, dict[str, Any]]] = json.loads(FIGURES.read_text())
DATA = "fingerprint/data"
# Sums in another order round differently; what is trained carries that on from step to step.
CLOSE = {"finetuned": 1e-4}
CLOSEST = 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_figures(name: str, tmp_path: Path) -> None:
    jobs, golden = run(name, tmp_path), GOLDEN[name]
    assert jobs.keys() == golden.keys()
    for number, figures in jobs.items():
        if figures[DATA] != golden[number][DATA]:  # the embedded text is the interpreter's own
            missing("the golden figures are those of Python 3.11.7's standard library")
        assert figures.keys() == golden[number].keys()
        for key, value in golden[number].items():
            if isinstance(value, float):
                close = CLOSE.get(key.partition("/")[0], CLOSEST)
                value = pytest.approx(value, rel=close, abs=1e-9)
            assert figures[key] == value, (number, key)
