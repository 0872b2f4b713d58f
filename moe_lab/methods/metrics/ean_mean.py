"""The expert activation norm per routed token."""

import torch

from moe_lab.profile.layer import LayerStatistics


def ean_mean(layer: LayerStatistics) -> torch.Tensor:
    """Mean l2 norm of an expert's output over its routed tokens [E].

    S_j = 1/|X_j| sum_{x in X_j} ||f_j(x)||_2, with which REAP (2510.13999) compares; 2606.15716
    calls it MAN. 0 for an expert that saw no token.
    """
    return layer.mean("norm_sum")
