"""Layers by the harm that each does alone to its own output."""

from __future__ import annotations

from moe_lab.methods.condense.base import LayerCandidates, ranked_layers
from moe_lab.types import Choice


def choose(layers: LayerCandidates, num_layers: int) -> Choice:
    """The layers with the lowest JS divergence of their own output, each condensed alone."""
    return ranked_layers(layers.indices, layers.condensed().local_js(), num_layers)
