"""Experts by the size of their weights."""

from __future__ import annotations

from moe_lab.methods.condense.base import ExpertCandidates, ranked_experts
from moe_lab.models.experts import expert_parameters
from moe_lab.types import Choice


def choose(candidates: ExpertCandidates, num_routed: int) -> Choice:
    """The experts with the highest l1 norm of all their weights; needs no calibration data."""
    with candidates.experts() as experts:
        norms = [
            sum(float(weight.abs().double().sum()) for weight in parameters.values())
            for parameters in expert_parameters(experts)
        ]
    return ranked_experts(norms, num_routed)
