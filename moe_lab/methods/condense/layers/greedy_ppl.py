"""Forward selection of layers by the perplexity of the calibration text."""

from __future__ import annotations

from moe_lab.methods.condense.base import LayerCandidates
from moe_lab.methods.condense.layer_search import greedy_layers
from moe_lab.types import Choice


def choose(layers: LayerCandidates, num_layers: int) -> Choice:
    """Condense, again and again, the layer that gives the lowest perplexity.

    The plan's layer_divergence holds the perplexity after each choice.
    """
    sets = layers.condensed()
    return greedy_layers(sets, num_layers, layers.beam, sets.perplexity)
