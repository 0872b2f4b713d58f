"""Layer Drop: whole MoE sublayers go, attention stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_lab.methods.layer_choice import check_layers, choose_layers, example_layers
from moe_lab.models.edits.base import Edit
from moe_lab.models.edits.drop_layer import DropLayer
from moe_lab.models.edits.keep import KeepLayer
from moe_lab.models.edits.plan import Plan
from moe_lab.profile.profile import Profile
from moe_lab.types import LayerInfo, UserError


@dataclass(frozen=True)
class DropLayers:
    """Drop the MoE sublayer of `num_layers` decoder layers: the residual passes by it unchanged.

    He et al. (2406.02500), Layer Drop: importance 1 - cos(x, x + MoE(norm(x))), mean over
    calibration tokens on the intact model, all layers chosen at once. Only MoE layers are
    candidates; the original may take the MLP of a dense layer, too. layers: cosine, or an explicit
    list of decoder layers (then num_layers does not count). padding: the largest share of the
    model's parameters that zeros may take so that stock transformers can hold it.
    """

    num_layers: int
    layers: str | Sequence[int] = "cosine"
    padding: float = 0.01

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse layers and numbers that do not exist."""
        check_layers("drop_layers", self.layers, self.num_layers, ["cosine"], layers)
        if not 0 <= self.padding <= 1:
            raise UserError(f"method.padding={self.padding}: it must be from 0 to 1")

    def example(self, layers: Sequence[LayerInfo]) -> tuple[Edit, ...]:
        """Edits of the shape that the plan will have; of its layers only the number is known."""
        return tuple(
            DropLayer(info.index, info.name)
            for info in example_layers(self.layers, self.num_layers, layers)
        )

    def plan(self, profile: Profile) -> Plan:
        """One edit per MoE layer, its score the mean similarity."""
        order = choose_layers(self.layers, self.num_layers, profile.statistics, "layer")
        edits = tuple(
            (DropLayer if one.info.index in order else KeepLayer)(
                one.info.index,
                one.info.name,
                scores=(one.mean_cosine("layer"),),
            )
            for one in profile.statistics
        )
        notes = {
            "statistics": "intact model",
            "scores": "mean cosine of x and x + MoE(norm(x)): the highest is dropped first",
            "padding": self.padding,
        }
        return Plan(edits, layer_order=order, notes=notes)
