"""Experts by their constant gates."""

from __future__ import annotations

from moe_lab.methods.condense.base import ExpertCandidates, ranked_experts
from moe_lab.types import Choice


def choose(candidates: ExpertCandidates, num_routed: int) -> Choice:
    """The experts with the highest constant gates (condense.gates)."""
    return ranked_experts(candidates.gates_E, num_routed)
