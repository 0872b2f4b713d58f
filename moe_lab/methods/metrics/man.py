"""Mean activation norm."""

import torch

from moe_lab.profile.layer import LayerStatistics


def man(layer: LayerStatistics) -> torch.Tensor:
    """Mean l2 norm of an expert's output over its routed tokens [E].

    MAN (2606.15716), its choice without a task in mind: S_j = 1/|X_j| sum_{x in X_j} ||f_j(x)||_2.
    0 for an expert that saw no token.
    """
    return layer.mean("norm_sum")
