"""Block Drop: whole decoder layers go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_lab.methods.layer_choice import check_layers, choose_layers, example_layers
from moe_lab.models.edits.base import Edit
from moe_lab.models.edits.drop_block import DropBlock
from moe_lab.models.edits.keep import KeepLayer
from moe_lab.models.edits.plan import Plan
from moe_lab.profile.profile import Profile
from moe_lab.types import LayerInfo, UserError


@dataclass(frozen=True)
class DropBlocks:
    """Drop `num_layers` decoder layers with their attention; the others are renumbered.

    He et al. (2406.02500), Block Drop: importance 1 - cos(input, output) of the decoder layer, mean
    over calibration tokens on the intact model, all layers chosen at once. Only decoder layers
    with an MoE are candidates; the original may take a dense one, too. layers: cosine, or an
    explicit list of decoder layers (then num_layers does not count).
    """

    num_layers: int
    layers: str | Sequence[int] = "cosine"

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse layers and numbers that do not exist, and dropping all of a model."""
        check_layers("drop_blocks", self.layers, self.num_layers, ["cosine"], layers)
        number = self.num_layers if isinstance(self.layers, str) else len(self.layers)
        if number >= layers[0].num_decoders:
            raise UserError(
                f"method=drop_blocks would drop all {number} decoder layers of the model: at least "
                "one must stay"
            )

    def example(self, layers: Sequence[LayerInfo]) -> tuple[Edit, ...]:
        """Edits of the shape that the plan will have; of its layers only the number is known."""
        return tuple(
            DropBlock(info.index, info.name)
            for info in example_layers(self.layers, self.num_layers, layers)
        )

    def plan(self, profile: Profile) -> Plan:
        """One edit per MoE layer, its score the mean similarity."""
        order = choose_layers(self.layers, self.num_layers, profile.statistics, "block")
        edits = tuple(
            (DropBlock if one.info.index in order else KeepLayer)(
                one.info.index,
                one.info.name,
                scores=(one.mean_cosine("block"),),
            )
            for one in profile.statistics
        )
        notes = {
            "statistics": "intact model",
            "scores": "mean cosine of a decoder layer's input and output: the highest goes first",
        }
        return Plan(edits, layer_order=order, notes=notes)
