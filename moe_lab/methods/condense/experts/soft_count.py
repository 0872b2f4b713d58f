"""Experts by the router's full probability."""

from __future__ import annotations

from moe_lab.methods.condense.base import ExpertCandidates, ranked_experts
from moe_lab.types import Choice


def choose(candidates: ExpertCandidates, num_routed: int) -> Choice:
    """The experts with the highest sum of the router's full probability over all tokens.

    SEER-MoE (2404.05089): soft heavy-hitters counting.
    """
    return ranked_experts(candidates.statistics["probability_sum"], num_routed)
