"""Hidden units of all experts and of the shared ones, by forward orthogonal least squares."""

from __future__ import annotations

from torch import Tensor

from moe_lab.methods.condense.base import CHOICE_RIDGE, UnitCandidates, of_units
from moe_lab.methods.forward_selection import forward_selection


@of_units
def choose(candidates: UnitCandidates) -> Tensor:
    """Add, again and again, the unit with which the layer can be fitted best, all others refitted.

    Forward selection by orthogonal least squares (Chen, Billings and Luo 1989): what a unit adds to
    those chosen before is what of its activations they cannot say. Ours for condensed layers.
    """
    return forward_selection(candidates.equations, candidates.width, CHOICE_RIDGE).units_K
