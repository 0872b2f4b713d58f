"""Layer Drop: whole MoE sublayers go, attention stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from moe_lab.methods.base import form_notes
from moe_lab.methods.dropping import Dropping
from moe_lab.models.edits.drop_layer import DropLayer
from moe_lab.models.superset import Convert
from moe_lab.option import Option


@dataclass(frozen=True)
class DropLayers(Dropping):
    """Drop the MoE sublayer of `num_layers` decoder layers: the residual passes by it unchanged.

    He et al. (2406.02500), Layer Drop: importance 1 - cos(x, x + MoE(norm(x))). The original may
    take the MLP of a dense layer, too.
    """

    padding: Annotated[
        float,
        Option("largest share of zeros so that stock transformers can hold it", least=0, most=1),
    ] = 0.01
    convert: Convert = None

    name = "drop_layers"
    edit = DropLayer
    cosine = "layer"

    @property
    def notes(self) -> dict[str, Any]:
        """What the plan says of its scores."""
        scores = "mean cosine of x and x + MoE(norm(x)): the highest is dropped first"
        return {"scores": scores} | form_notes(self.padding, self.convert)
