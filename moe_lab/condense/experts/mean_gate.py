"""Experts by their constant gates."""

from __future__ import annotations

from moe_lab.condense import Candidates, ranked
from moe_lab.types import Choice


def choose(candidates: Candidates, num_routed: int) -> Choice:
    """The experts with the highest constant gates (condense.gates)."""
    return ranked(candidates.gates_E, num_routed)
