"""Block Drop: whole decoder layers go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moe_lab.methods.dropping import Dropping
from moe_lab.models.edits.drop_block import DropBlock
from moe_lab.types import LayerInfo, UserError


@dataclass(frozen=True)
class DropBlocks(Dropping):
    """Drop `num_layers` decoder layers with their attention; the others are renumbered.

    He et al. (2406.02500), Block Drop: importance 1 - cos(input, output) of the decoder layer. The
    original may take a dense one, too.
    """

    name = "drop_blocks"
    edit = DropBlock
    cosine = "block"

    @property
    def notes(self) -> dict[str, Any]:
        """What the plan says of its scores."""
        words = "mean cosine of a decoder layer's input and output: the highest goes first"
        return {"scores": words}

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse layers and numbers that do not exist, and dropping all of a model."""
        super().check(layers)
        number = self.num_layers if isinstance(self.layers, str) else len(self.layers)
        if number >= layers[0].num_decoders:
            raise UserError(
                f"method=drop_blocks would drop all {number} decoder layers of the model: at least "
                "one must stay"
            )
