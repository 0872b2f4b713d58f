"""Whole experts by forward least squares, beside the shared ones."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.methods.condense.base import CHOICE_RIDGE, UnitCandidates, of_units
from moe_lab.methods.forward_selection import forward_selection
from moe_lab.models.dense_units import SHARED_PART


@of_units
def choose(candidates: UnitCandidates) -> Tensor:
    """Add, again and again, the expert with which the layer can be fitted best, all else refitted.

    `neurons` in groups: all units of an expert at once, and the shared experts from the start.
    """
    expert_N = candidates.units_N2[:, 0]
    shared_K = (expert_N == SHARED_PART).nonzero()[:, 0]
    selected = forward_selection(
        candidates.equations,
        candidates.num_routed,
        CHOICE_RIDGE,
        group_N=expert_N,
        start_K=shared_K,
    )
    return torch.cat([shared_K, selected.units_K.cpu()])
