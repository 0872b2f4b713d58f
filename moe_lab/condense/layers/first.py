"""The first MoE layers."""

from __future__ import annotations

from moe_lab.condense import Layers
from moe_lab.types import Choice


def choose(layers: Layers, num_layers: int) -> Choice:
    """The MoE layers nearest to the embedding."""
    return Choice(tuple(layers.indices[:num_layers]))
