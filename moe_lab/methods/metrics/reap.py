"""Router-weighted expert activation pruning."""

import torch

from moe_lab.profile.layer import LayerStatistics


def reap(layer: LayerStatistics) -> torch.Tensor:
    """Mean over routed tokens of router weight times output norm [E].

    REAP (2510.13999): S_j = 1/|X_j| sum_{x in X_j} g_j(x) ||f_j(x)||_2, with the router's own
    weight g; 0 for an expert that saw no token.
    """
    return layer.mean("gate_norm_sum")
