"""What a hidden unit adds to its layer's output."""

import torch

from moe_lab.methods.metrics.base import of_neurons
from moe_lab.profile.layer import LayerStatistics


@of_neurons()
def energy(layer: LayerStatistics) -> torch.Tensor:
    """Energy of what each hidden unit adds over the tokens routed to its expert [E, I]. Ours.

    S_ec = sum_t (g_t a_tc)^2 ||w_c||^2, g the router's weight, a the unit's activation and w_c its
    column of the down projection: g a w_c is exactly what the layer's output loses without the
    unit. Units of an expert are ranked among themselves.
    """
    return layer["gate_hidden_square_sum"] * layer["down_square_sum"]
