"""The expert activation norm."""

import torch

from moe_lab.profile.layer import LayerStatistics


def ean(layer: LayerStatistics) -> torch.Tensor:
    """l2 norm of an expert's output, summed over its routed tokens [E].

    MC-Suite (2504.05586), expert activation norm: S_j = sum_{x in X_j} ||f_j(x)||_2.
    """
    return layer["norm_sum"]
