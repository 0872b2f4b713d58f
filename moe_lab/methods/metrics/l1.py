"""How large an expert's weights are."""

import torch

from moe_lab.methods.metrics.base import from_routers
from moe_lab.profile.layer import LayerStatistics


@from_routers
def l1(layer: LayerStatistics) -> torch.Tensor:
    """Sum of the absolute values of all weights of an expert [E]: S_j = ||W_j||_1.

    The magnitude criterion of Li et al. (1608.08710), with experts in the place of filters. No
    calibration text enters it.
    """
    return layer["weight_abs_sum"]
