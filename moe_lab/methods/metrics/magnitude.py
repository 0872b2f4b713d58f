"""How large a hidden unit's weights are."""

import torch

from moe_lab.methods.metrics.base import of_neurons
from moe_lab.profile.layer import LayerStatistics


@of_neurons()
def magnitude(layer: LayerStatistics) -> torch.Tensor:
    """l2 norm of all weights of each hidden unit [E, I]: gate, up and down projection together.

    The magnitude criterion of Li et al. (1608.08710) with hidden units in the place of filters. No
    calibration text enters it.
    """
    return layer["neuron_square_sum"].sqrt()
