"""Hundreds of jobs in one process, as of a notebook or a launcher, leave nothing behind."""

from __future__ import annotations

from pathlib import Path

import growing
import pytest
from fuzzed import Tally
from running import QUICK

JOBS = 500
WARM_UP = 100  # in which caches fill
# A job may leave so much, by the slope's lower bound, that noise alone judges none. Of memory, less
# than a third of a job's model: safetensors' slices leave 56 bytes of each tensor that is read.
BOUNDS = {"memory in MiB": 0.1, "open handles": 0.01, "threads": 0.01, "temporary files": 0.01}


@pytest.mark.faults
def test_many_jobs_in_one_process(small: list[str], tmp_path: Path, tally: Tally) -> None:
    held = growing.many([*small, *QUICK], JOBS, tmp_path)
    assert len(held) == JOBS
    for what, bound in BOUNDS.items():
        values = [row[what] for row in held[WARM_UP:]]
        slope, low = growing.slope(values)
        told = f"{values[0]:g} → {values[-1]:g}, {slope:+.4f} a job (lower bound {low:+.4f})"
        tally.notes[what] = told
        tally.judge(low <= bound, f"{what}: {told}")
    tally.check()
