"""How much an expert's output varies, and how much of it is used."""

import torch

from moe_lab.profile.layer import LayerStatistics


def mone(layer: LayerStatistics) -> torch.Tensor:
    """Spread of an expert's output times its mean router weight [E].

    MoNE (2507.00390): S_j = phi_var phi_freq. phi_var is the l2 norm over the hidden dimension of
    the unbiased standard deviation of f_j over the tokens routed to j (0 for fewer than two), and
    phi_freq the weight of j averaged over all tokens, 0 where it is not chosen.
    """
    count = layer["count"]
    of_mean = layer["output_sum"].square().sum(dim=1) / count.clamp(min=1)
    around_mean = (layer["norm_square_sum"] - of_mean).clamp(min=0)  # over all components
    variance = around_mean / (count - 1).clamp(min=1)
    spread = torch.where(count > 1, variance.sqrt(), torch.zeros_like(count))
    return spread * layer["gate_sum"] / layer["tokens"]
