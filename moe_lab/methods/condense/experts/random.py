"""Experts drawn at random: what every criterion has to beat."""

from __future__ import annotations

import random

from moe_lab.methods.condense.base import ExpertCandidates
from moe_lab.types import Choice


def choose(candidates: ExpertCandidates, num_routed: int) -> Choice:
    """A draw from condense.seed and the layer's index."""
    generator = random.Random(f"{candidates.seed}/experts/{candidates.statistics.info.index}")
    return Choice(tuple(generator.sample(range(candidates.num_experts), num_routed)))
