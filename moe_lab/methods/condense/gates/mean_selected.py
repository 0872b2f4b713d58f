"""CD-MoE's gates: the mean router weight of the tokens that were sent to an expert."""

from __future__ import annotations

from torch import Tensor

from moe_lab.profile.layer import LayerStatistics


def choose(statistics: LayerStatistics) -> Tensor:
    """Gates [E], conditional on selection; 0 for an expert that no token was sent to.

    CD-MoE (2412.00069): w_i = sum_{t: i in TopK(t)} g_i(t) / #{t: i in TopK(t)}.
    """
    return statistics.mean("gate_sum")
