"""A sweep of reports."""

from __future__ import annotations

from pathlib import Path

import pytest
from tabled import ACCURACY, write


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two experts options, two numbers of layers; random has three seeds, one job failed."""
    folder = tmp_path / "sweep"
    for number, ((layers, seed), accuracy) in enumerate(ACCURACY.items()):
        write(folder, number, condense__experts="random", condense__num_layers=layers,
              condense__seed=seed, dense__eval__average=0.9, compressed__eval__average=accuracy,
              compressed__kl=layers / 10, dense__parameters=1000, compressed__parameter_ratio=0.75,
              compressed__prefill_speedup=1.25)  # fmt: skip
    write(folder, 6, condense__experts="l1", condense__num_layers=2, condense__seed=0,
          dense__eval__average=0.9, compressed__eval__average=0.7)  # fmt: skip
    write(folder, 10, condense__experts="l1", condense__num_layers=4, condense__seed=0,
          status="failed", error="too many\nlayers | 4", dense__eval__average=0.9)  # fmt: skip
    return folder
