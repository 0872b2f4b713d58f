"""How much router weight an expert got."""

import torch

from moe_lab.methods.metrics.base import from_routers
from moe_lab.profile.layer import LayerStatistics


@from_routers
def gate_sum(layer: LayerStatistics) -> torch.Tensor:
    """Router weight summed over the tokens routed to each expert [E].

    S_j = sum_{x in X_j} g_j(x), g the weight that the router hands to the expert; (0, 1, 0) in the
    family of 2606.15716. SEER-MoE's soft count (2404.05089) is another criterion: the full
    probability, over all tokens.
    """
    return layer["gate_sum"]
