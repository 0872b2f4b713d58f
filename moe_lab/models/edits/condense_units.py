"""The layer becomes one dense MLP of some of its hidden units, fitted to what it computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_lab.models.edits.base import Edit, Fate
from moe_lab.types import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from moe_lab.models.layers import Standing


@dataclass(frozen=True)
class CondenseUnits(Edit):
    """A dense gated MLP of `width` hidden units, whichever of the layer's own, with new columns.

    Which units, and the down projection, are in the plan's tensors "layers.<index>.condensed.":
    "units" [W, 2] (the expert, -1 for the shared ones, and its unit) and "down_proj" [D, W];
    fitted=all: also "gate_proj" and "up_proj" [W, D], which began as the units' own. experts,
    units: the routed experts that have units in it, and how many; shared_units: those of the
    shared experts. ridge: how strongly the fit was held at the constant gates' columns
    (`ridge.Ridge`), in words. errors: relative squared errors of what the layer adds: on
    the held-out documents with the constant gates, on the same with the fit, and of the final fit
    on all; behind gradient steps, whose number is `steps`, also on the held-out documents with
    these.
    """

    width: int = 0
    experts: tuple[int, ...] = ()
    units: tuple[int, ...] = ()
    shared_units: int = 0
    fitted: str = "down_proj"
    steps: int = 0
    ridge: str = ""
    errors: tuple[float, ...] = ()

    kind = "condense_units"
    leaves_moe = False
    trains = "all"
    joined = ("part of the condensed layer", "hidden units in it")

    def restructure(self, standing: Standing, tensors: Mapping[str, Tensor]) -> nn.Module:
        """A dense MLP of that width."""
        from moe_lab.models.dense_units import dense_of

        return dense_of(self.moe_layer(standing), self.width)

    def apply(self, standing: Standing, tensors: Mapping[str, Tensor]) -> nn.Module:
        """The units that the plan names, with its new columns."""
        from moe_lab.models.dense_units import columns_name, dense_of, rows_name, units_name
        from moe_lab.models.editing import plan_tensor

        layer = self.moe_layer(standing)
        size, why = layer.info.hidden_size, f"the plan condenses layer {self.index}"
        units_W2 = plan_tensor(tensors, units_name(self.index), (self.width, 2), why)
        self._check_units(units_W2, layer.info.num_experts)
        columns_DW = plan_tensor(tensors, columns_name(self.index), (size, self.width), why)
        rows = None
        if self.fitted == "all":
            gate_WD, up_WD = (
                plan_tensor(tensors, rows_name(self.index, which), (self.width, size), why)
                for which in ("gate_proj", "up_proj")
            )
            rows = gate_WD, up_WD
        return dense_of(layer, self.width, units_W2, columns_DW, rows)

    def _check_units(self, units_W2: Tensor, num_experts: int) -> None:
        least, most = int(units_W2[:, 0].min()), int(units_W2[:, 0].max())
        if least < -1 or most >= num_experts:
            raise UserError(
                f"layer {self.index}: the plan takes units of experts {least} to {most}, and the "
                f"layer has experts 0 to {num_experts - 1}"
            )

    @property
    def title(self) -> str:
        """With the width."""
        return f"condense to {self.width} hidden units"

    @property
    def cells(self) -> dict[str, list[Any]]:
        """Where the units come from, and what the fit cost and gained."""
        shown: dict[str, list[Any]] = {
            "hidden units": [["shared", self.shared_units], *self.units],
            "errors": list(self.errors),
        }
        return shown | ({"ridge": [self.ridge]} if self.ridge else {})

    @property
    def experts_kept(self) -> tuple[int, ...] | None:
        """The experts of which units are in it."""
        return self.experts

    def fate(self, expert: int) -> Fate:
        """A part of the MLP, with so many of its hidden units, or removed."""
        if expert not in self.experts:
            return Fate("removed")
        return Fate("joined", self.units[self.experts.index(expert)])
