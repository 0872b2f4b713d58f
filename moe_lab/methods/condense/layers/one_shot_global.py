"""Layers by the harm that each does alone to the last hidden state."""

from __future__ import annotations

from moe_lab.methods.condense.base import LayerCandidates, ranked_layers
from moe_lab.types import Choice


def choose(layers: LayerCandidates, num_layers: int) -> Choice:
    """The layers with the lowest JS divergence of the last hidden state, each condensed alone."""
    sets = layers.condensed()
    return ranked_layers(layers.indices, sets.js([[index] for index in layers.indices]), num_layers)
