"""Forward selection of experts by the Jensen-Shannon divergence of the layer's output."""

from __future__ import annotations

from moe_lab.methods.condense import divergence
from moe_lab.methods.condense.base import ExpertCandidates
from moe_lab.methods.condense.expert_search import greedy_experts
from moe_lab.types import Choice


def choose(candidates: ExpertCandidates, num_routed: int) -> Choice:
    """Add, again and again, the expert that brings the layer's output closest to the intact one.

    CD-MoE (2412.00069): S <- S + argmin_i JS(h, h^(S+i)), h the output of the decoder layer (after
    the final norm for the last one), all other layers intact. Every expert's output is computed
    once; a candidate costs one addition and one divergence.
    """
    return greedy_experts(candidates.open(), candidates.gates_E, num_routed, divergence.js)
