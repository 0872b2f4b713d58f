"""CAMERA-P: the largest contribution of a hidden unit."""

from typing import Annotated

import torch

from moe_lab.methods.metrics.base import of_neurons
from moe_lab.option import Option
from moe_lab.profile.layer import LayerStatistics


@of_neurons(widths="by_expert")
def camera(
    layer: LayerStatistics,
    alpha: Annotated[
        float, Option("share of the maximum in the score, the rest of the sum", least=0, most=1)
    ],
) -> torch.Tensor:
    """Energy of each hidden unit, its sum over tokens mixed with its maximum [E, I].

    CAMERA-P (2508.02322): S_ec = ((1 - alpha) sum_t (g_t a_tc)^2 + alpha max_t (g_t a_tc)^2)
    ||w_c||^2, g the router's weight (0 where the token does not choose the expert), a the unit's
    activation, w_c its column of the down projection. Its micro-experts are ranked over all experts
    of a layer together; it goes on to the next layer behind the pruned one (method.propagate).
    """
    mixed = (1 - alpha) * layer["gate_hidden_square_sum"]
    mixed = mixed + alpha * layer["gate_hidden_max"].square()
    return mixed * layer["down_square_sum"]
