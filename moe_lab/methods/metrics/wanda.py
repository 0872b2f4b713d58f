"""Weights times activations, after Wanda."""

import torch

from moe_lab.methods.metrics.base import of_neurons
from moe_lab.profile.layer import LayerStatistics


@of_neurons()
def wanda(layer: LayerStatistics) -> torch.Tensor:
    """Sum of Wanda's scores over the column of each hidden unit in the down projection [E, I].

    Wanda (2306.11695) scores single weights, |W_ij| ||X_j||_2, X_j the activations that meet them;
    S_ec = sum_i |W_ic| ||a_c||_2, a_c over the tokens routed to the expert. No router weight enters
    it.
    """
    return layer["down_abs_sum"] * layer["hidden_square_sum"].sqrt()
