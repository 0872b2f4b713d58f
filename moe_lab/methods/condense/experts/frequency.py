"""Experts by how many tokens the router sent to them."""

from __future__ import annotations

from moe_lab.methods.condense.base import ExpertCandidates, ranked_experts
from moe_lab.types import Choice


def choose(candidates: ExpertCandidates, num_routed: int) -> Choice:
    """The most used experts."""
    return ranked_experts(candidates.statistics["count"], num_routed)
