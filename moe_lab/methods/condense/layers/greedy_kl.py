"""Forward selection of layers by the Kullback-Leibler divergence of the last hidden state."""

from __future__ import annotations

from moe_lab.methods.condense.base import LayerCandidates
from moe_lab.methods.condense.layer_search import greedy_layers
from moe_lab.types import Choice


def choose(layers: LayerCandidates, num_layers: int) -> Choice:
    """Condense, again and again, the layer that gives the lowest Kullback-Leibler divergence.

    As greedy_js, with KL(H || H^(P+l)) in the place of JS.
    """
    sets = layers.condensed()
    return greedy_layers(sets, num_layers, layers.beam, sets.kl)
