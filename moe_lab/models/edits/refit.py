"""The experts of a layer get new down projections: no shape changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_lab.models.edits.base import Edit
from moe_lab.types import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from moe_lab.models.hidden_units import HiddenUnits
    from moe_lab.models.layers import MoELayer, Standing


@dataclass(frozen=True)
class RefitExperts(Edit):
    """All that is left of the layer computes with new down projections, found by least squares.

    They are the plan's tensors "layers.<index>.refit.down_proj" [E, D, I], of the experts that
    earlier edits of the layer left, zeros behind the units of one that has fewer than I, and, where
    shared, "layers.<index>.refit.shared_down_proj" [D, Is] of the shared experts. ridges: strength
    and scale (`ridge.Ridge`), one where all units were refitted together, else one for each
    expert, and the shared ones last. error: how much of the squared error that the earlier edits
    left is still there on all calibration documents; held_error: on those that chose the ridge,
    fitted on the others.
    """

    shared: bool = False
    ridges: tuple[tuple[float, str], ...] = ()
    error: float | None = None
    held_error: float | None = None

    kind = "refit"
    trains = "experts"

    def to_json(self) -> dict[str, Any]:
        """Without what is not there."""
        values = super().to_json()
        return {name: v for name, v in values.items() if not (v is None or v is False or v == [])}

    @property
    def cells(self) -> dict[str, list[Any]]:
        """The ridge, or how many there are, and how much of the error is left."""
        words = sorted({f"{strength:g} ({scale})" for strength, scale in self.ridges})
        errors = (self.error, self.held_error)
        told = [round(error, 4) for error in errors if error is not None]
        columns: dict[str, list[Any]] = {"ridge": words, "error left": told}
        return {name: places for name, places in columns.items() if places}

    def restructure(self, standing: Standing, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Refuse experts that are no plain sum of their hidden units; no shape changes."""
        from moe_lab.models.refitting import check_sum

        layer = self.moe_layer(standing)
        check_sum(layer)
        return layer.block

    def apply(self, standing: Standing, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Put the plan's columns in the place of what is there."""
        from moe_lab.models.hidden_units import HiddenUnits

        layer = self.moe_layer(standing)
        units = HiddenUnits(layer.experts)
        units.set_down(self._columns(layer, units, tensors))
        if self.shared:
            self._set_shared(layer, tensors)
        return layer.block

    def _columns(
        self, layer: MoELayer, units: HiddenUnits, tensors: Mapping[str, Tensor]
    ) -> Tensor:
        """[E, D, I], zeros where an expert has no unit."""
        import torch

        from moe_lab.models.editing import plan_tensor
        from moe_lab.models.refitting import refit_name
        from moe_lab.models.widths import widths_of

        number, width, size = units.down_columns().shape
        name, shape = refit_name(self.index), (number, size, width)
        new_EDI = plan_tensor(tensors, name, shape, self._why)
        widths_E1 = torch.tensor(widths_of(layer.experts))[:, None]
        behind_EI = torch.arange(width) >= widths_E1
        return new_EDI.masked_fill(behind_EI[:, None], 0.0)

    def _set_shared(self, layer: MoELayer, tensors: Mapping[str, Tensor]) -> None:
        from moe_lab.models.editing import plan_tensor
        from moe_lab.models.refitting import shared_down, shared_refit_name

        down = shared_down(layer)
        if down is None:
            raise UserError(f"{self._why}, whose shared experts are no plain or gated MLP")
        shape = tuple(down.weight.shape)
        new_DI = plan_tensor(tensors, shared_refit_name(self.index), shape, self._why)
        down.weight.copy_(new_DI)

    @property
    def _why(self) -> str:
        return f"the plan refits the experts of layer {self.index}"
