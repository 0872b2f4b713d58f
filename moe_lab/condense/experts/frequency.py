"""Experts by how many tokens the router sent to them."""

from __future__ import annotations

from moe_lab.condense import Candidates, ranked
from moe_lab.types import Choice


def choose(candidates: Candidates, num_routed: int) -> Choice:
    """The most used experts."""
    return ranked(candidates.statistics["count"], num_routed)
