"""Forward selection of layers by the Jensen-Shannon divergence of the last hidden state."""

from __future__ import annotations

from moe_lab.methods.condense.base import LayerCandidates
from moe_lab.methods.condense.layer_search import greedy_layers
from moe_lab.types import Choice


def choose(layers: LayerCandidates, num_layers: int) -> Choice:
    """Condense, again and again, the layer that gives the lowest Jensen-Shannon divergence.

    CD-MoE (2412.00069): after the experts of every layer are fixed,
    P <- P + argmin_l JS(H, H^(P+l)) with H the last hidden state after the final norm.
    """
    sets = layers.condensed()
    return greedy_layers(sets, num_layers, layers.beam, sets.js)
