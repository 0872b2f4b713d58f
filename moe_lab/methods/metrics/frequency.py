"""How often the router chose an expert."""

import torch

from moe_lab.methods.metrics.base import from_routers
from moe_lab.profile.layer import LayerStatistics


@from_routers
def frequency(layer: LayerStatistics) -> torch.Tensor:
    """Tokens routed to each expert [E]: a_j = sum_x 1[j in TopK(p(x))].

    SEER-MoE (2404.05089), heavy-hitters counting, actual count.
    """
    return layer["count"]
