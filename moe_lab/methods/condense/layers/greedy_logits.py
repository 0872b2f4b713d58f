"""Forward selection of layers by what a condensed layer does to the model's predictions."""

from __future__ import annotations

from moe_lab.methods.condense.base import LayerCandidates
from moe_lab.methods.condense.layer_search import greedy_layers
from moe_lab.types import Choice


def choose(layers: LayerCandidates, num_layers: int) -> Choice:
    """Condense, again and again, the layer that gives the lowest divergence of the predictions.

    P <- P + argmin_l KL(p || p^(P+l)) with p the next token's distribution, in nats, on documents
    on which nothing was fitted. Unlike the divergence of the last hidden state it does not count
    what the head does not read.
    """
    sets = layers.refitted()
    return greedy_layers(sets, num_layers, layers.beam, sets.logits_kl)
