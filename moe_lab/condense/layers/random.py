"""Layers drawn at random: what every criterion has to beat."""

from __future__ import annotations

import random

from moe_lab.condense import Layers
from moe_lab.types import Choice


def choose(layers: Layers, num_layers: int) -> Choice:
    """A draw from condense.seed."""
    generator = random.Random(f"{layers.seed}/layers")
    return Choice(tuple(generator.sample(layers.indices, num_layers)))
