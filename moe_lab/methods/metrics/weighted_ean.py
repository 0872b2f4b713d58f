"""The expert activation norm, weighted."""

import torch

from moe_lab.profile.layer import LayerStatistics


def weighted_ean(layer: LayerStatistics) -> torch.Tensor:
    """Router weight times l2 norm of the output, summed over routed tokens [E].

    S_j = sum_{x in X_j} g_j(x) ||f_j(x)||_2, with which REAP (2510.13999) compares; REAP itself is
    its mean over these tokens.
    """
    return layer["gate_norm_sum"]
