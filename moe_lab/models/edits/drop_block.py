"""The whole decoder layer goes, with its attention; the layers behind it get new numbers."""

from __future__ import annotations

from dataclasses import dataclass

from moe_lab.models.edits.base import Edit


@dataclass(frozen=True)
class DropBlock(Edit):
    """Block Drop (He et al., 2406.02500). scores: one of the layer; the notes say of what."""

    scores: tuple[float, ...] = ()

    kind = "drop_block"
    leaves_moe = False
    drops_layer = True
    removes_decoder = True
