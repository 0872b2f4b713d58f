"""The first MoE layers."""

from __future__ import annotations

from moe_lab.condense import Choice, Layers


def choose(layers: Layers, num_layers: int) -> Choice:
    """The MoE layers nearest to the embedding."""
    return Choice(tuple(layers.indices[:num_layers]))
