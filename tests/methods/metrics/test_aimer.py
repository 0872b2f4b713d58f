"""AIMER where there is nothing to measure."""

from __future__ import annotations

import torch
from layer_statistics import TWO

from moe_lab.methods.metrics.aimer import aimer
from moe_lab.profile.layer import LayerStatistics


def test_weights_that_are_all_0_score_lowest() -> None:
    sums = {"weight_abs_sum": [0.0, 3.0], "weight_square_sum": [0.0, 3.0], "weight_count": [3.0]}
    sums = {name: torch.tensor(value, dtype=torch.float64) for name, value in sums.items()}
    assert aimer(LayerStatistics(TWO, sums)).tolist() == [-1, -1]
