"""Gates that keep each expert's mean contribution: its mean router weight over all tokens."""

from __future__ import annotations

from torch import Tensor

from moe_lab.profile.layer import LayerStatistics


def choose(statistics: LayerStatistics) -> Tensor:
    """Gates [E]: w_i = sum_t g_i(t) / #t, where g_i(t) is 0 for tokens not sent to expert i."""
    return statistics["gate_sum"] / statistics["tokens"]
