"""How much probability the router gave an expert."""

import torch

from moe_lab.methods.metrics.base import from_routers
from moe_lab.profile.layer import LayerStatistics


@from_routers
def soft_count(layer: LayerStatistics) -> torch.Tensor:
    """The router's full probability summed over all tokens [E]: s_j = sum_x p_j(x).

    SEER-MoE (2404.05089), heavy-hitters counting, soft count. All tokens count, not only those
    routed to the expert; where a router scores with a sigmoid, p is that sigmoid.
    """
    return layer["probability_sum"]
