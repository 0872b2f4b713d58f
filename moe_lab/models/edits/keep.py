"""Nothing happens to the layer."""

from __future__ import annotations

from dataclasses import dataclass

from moe_lab.models.edits.base import Edit


@dataclass(frozen=True)
class KeepLayer(Edit):
    """The layer stays as it is. scores: one of the layer, or none; the plan's notes say of what."""

    scores: tuple[float, ...] = ()

    kind = "keep"
    changes = False
    keeps_experts_as_they_are = True
