"""How unevenly an expert's weights are spread."""

import torch

from moe_lab.methods.metrics.base import from_routers
from moe_lab.profile.layer import LayerStatistics


@from_routers
def aimer(layer: LayerStatistics) -> torch.Tensor:
    """Minus the mean absolute weight over the root of the mean square [E], over all projections.

    AIMER (2603.18492): S_j = mean|W_j| / RMS(W_j), W_j all weights of gate, up and down projection
    together; the experts with the highest go first, hence the minus. In [-1, 0); -1, the lowest,
    for an expert whose weights are all 0. No calibration text enters it.
    """
    mean = layer["weight_abs_sum"] / layer["weight_count"]
    root = (layer["weight_square_sum"] / layer["weight_count"]).sqrt()
    return torch.where(root > 0, -mean / root, torch.full_like(mean, -1.0))
