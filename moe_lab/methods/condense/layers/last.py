"""The last MoE layers."""

from __future__ import annotations

from moe_lab.methods.condense.base import LayerCandidates
from moe_lab.types import Choice


def choose(layers: LayerCandidates, num_layers: int) -> Choice:
    """The MoE layers nearest to the head, the last one first."""
    return Choice(tuple(layers.indices[::-1][:num_layers]))
