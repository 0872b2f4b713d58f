"""Forward selection of experts by the Kullback-Leibler divergence of the layer's output."""

from __future__ import annotations

from moe_lab.methods.condense import divergence
from moe_lab.methods.condense.base import ExpertCandidates
from moe_lab.methods.condense.expert_search import greedy_experts
from moe_lab.types import Choice


def choose(candidates: ExpertCandidates, num_routed: int) -> Choice:
    """Add, again and again, the expert that brings the layer's output closest to the intact one.

    As greedy_js, with KL(h || h^(S+i)) in the place of JS.
    """
    return greedy_experts(candidates.open(), candidates.gates_E, num_routed, divergence.kl)
