"""How strong an expert is where the layer does something."""

import torch

from moe_lab.profile.layer import LayerStatistics


def easy_ep(layer: LayerStatistics) -> torch.Tensor:
    """Weight times output norm times the token's change, summed over routed tokens [E].

    EASY-EP (2504.06792): S_j = sum_{x in X_j} g_j(x) ||f_j(x)||_2 (1 - cos(h, h~)). As its code has
    it, h is the residual stream before the MoE sublayer, and h~ is h plus what the routed experts
    add to it, the shared ones left out.
    """
    return layer["gate_norm_change_sum"]
