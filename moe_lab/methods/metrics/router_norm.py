"""How long an expert's row of the router is."""

import torch

from moe_lab.methods.metrics.base import from_routers
from moe_lab.profile.layer import LayerStatistics


@from_routers
def router_norm(layer: LayerStatistics) -> torch.Tensor:
    """The l2 norm of each expert's router row [E]: ||W_G[e]||_2.

    MC-Suite (2504.05586), router weight norm. No calibration text enters it.
    """
    return layer["router_norm"]
