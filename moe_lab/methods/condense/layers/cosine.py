"""Layers in the order of Block Drop: those that change the hidden state least."""

from __future__ import annotations

from moe_lab.methods.condense.base import LayerCandidates, ranked_layers
from moe_lab.types import Choice


def choose(layers: LayerCandidates, num_layers: int) -> Choice:
    """The decoder layers with the highest mean cosine similarity of input and output.

    He et al. (2406.02500), one-shot on the intact model. The plan's layer_divergence holds
    1 - similarity.
    """
    distances = [
        1 - float(one["block_cosine_sum"] / one["tokens"]) for one in layers.statistics.values()
    ]
    return ranked_layers(layers.indices, distances, num_layers)
