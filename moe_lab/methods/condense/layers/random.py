"""Layers drawn at random: what every criterion has to beat."""

from __future__ import annotations

import random

from moe_lab.methods.condense.base import LayerCandidates
from moe_lab.types import Choice


def choose(layers: LayerCandidates, num_layers: int) -> Choice:
    """A draw from condense.seed."""
    generator = random.Random(f"{layers.seed}/layers")
    return Choice(tuple(generator.sample(layers.indices, num_layers)))
