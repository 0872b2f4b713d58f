"""Mean squared activation norm."""

import torch

from moe_lab.profile.layer import LayerStatistics


def msan(layer: LayerStatistics) -> torch.Tensor:
    """Mean squared l2 norm of an expert's output over its routed tokens [E].

    MSAN (2606.15716): S_j = 1/|X_j| sum_{x in X_j} ||f_j(x)||_2^2. 0 for an expert that saw no
    token.
    """
    return layer.mean("norm_square_sum")
