"""Experts stay, with fewer hidden units each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_lab.models.edits.base import Edit, Fate
from moe_lab.types import LayerInfo, UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from moe_lab.models.layers import MoELayer, Standing


@dataclass(frozen=True)
class NarrowExperts(Edit):
    """Every expert stays, with so many of its hidden units; all routing is as it was.

    widths: how many each expert keeps, one number for all or one for each. Which ones is in the
    plan's tensors: "layers.<index>.neurons" [E, I] has 1 for those that stay, which keep their
    order; "layers.<index>.neuron_scores" [E, I] their scores. shared_width: how many the shared
    experts keep, which "layers.<index>.shared_neurons" [I] names; None: all. refitted: whether the
    plan has new down projections for what stays, "layers.<index>.down_proj" [E, D, W], zeros behind
    the units of an expert that has fewer than W. scores: the sum of its units' for each expert, or
    none.
    """

    widths: tuple[int, ...] = ()
    shared_width: int | None = None
    refitted: bool = False
    scores: tuple[float, ...] = ()

    kind = "narrow"
    trains = "experts"

    def to_json(self) -> dict[str, Any]:
        """Without what is not there."""
        values = super().to_json()
        for name in ("shared_width", "refitted"):
            if not values[name]:
                del values[name]
        return values

    def check(self, info: LayerInfo | None) -> None:
        """Refuse widths that are not those of this layer's experts."""
        from moe_lab.models.layers import check_own_rows

        super().check(info)
        if info is None:
            return
        check_own_rows(info)
        if len(self.widths) not in (1, info.num_experts):
            raise UserError(
                f"layer {self.index}: {len(self.widths)} widths for {info.num_experts} experts"
            )
        if not 1 <= max(self.widths) <= info.expert_width or min(self.widths) < 0:
            raise UserError(
                f"layer {self.index}: its experts have {info.expert_width} hidden units and keep "
                f"0 to {info.expert_width} of them, at least one in all, not {self.word}"
            )
        if self.shared_width is not None and not 1 <= self.shared_width <= info.shared_width:
            raise UserError(
                f"layer {self.index}: its shared experts have {info.shared_width} hidden units and "
                f"keep 1 to {info.shared_width} of them, not {self.shared_width}"
            )

    def left(self, info: LayerInfo) -> LayerInfo | None:
        """The layer with narrower experts; what one takes is not told again."""
        shared = info.shared_width if self.shared_width is None else self.shared_width
        return dataclasses.replace(info, expert_width=max(self.widths), shared_width=shared)

    @property
    def word(self) -> str:
        """The width in words: "20", "16 to 24"."""
        least, most = min(self.widths), max(self.widths)
        return str(least) if least == most else f"{least} to {most}"

    @property
    def title(self) -> str:
        """With the width."""
        return f"narrow to {self.word}"

    @property
    def cells(self) -> dict[str, list[Any]]:
        """The widths."""
        return {"hidden units": list(self.widths)}

    @property
    def expert_scores(self) -> tuple[float, ...]:
        """One for each expert; may be empty."""
        return self.scores

    def fate(self, expert: int) -> Fate:
        """Kept, but for an expert without any hidden unit."""
        return Fate("kept" if self.width_of(expert) else "removed")

    def width_of(self, expert: int) -> int:
        """How many hidden units it keeps."""
        return self.widths[expert if len(self.widths) > 1 else 0]

    def restructure(self, standing: Standing, tensors: Mapping[str, Tensor]) -> nn.Module:
        """The first units of each expert: shapes alone."""
        from moe_lab.models.widths import first_units

        layer = self.moe_layer(standing)
        widths = self._widths(layer)
        kept_EW = first_units(widths, max(widths))
        return self._narrowed(layer, kept_EW, range(self.shared_width or 0))

    def apply(self, standing: Standing, tensors: Mapping[str, Tensor]) -> nn.Module:
        """The units that the plan names, with new down projections where it has some."""
        from moe_lab.models.editing import plan_tensor
        from moe_lab.models.hidden_units import HiddenUnits
        from moe_lab.models.narrowing import (
            down_proj_name,
            neurons_name,
            places_of_kept,
            shared_neurons_name,
        )

        layer = self.moe_layer(standing)
        info, why = layer.info, f"the plan narrows the experts of layer {self.index}"
        shape = info.num_experts, info.expert_width
        kept_EI = plan_tensor(tensors, neurons_name(self.index), shape, why).bool()
        if kept_EI.sum(dim=1).tolist() != list(self._widths(layer)):
            raise UserError(f"{why} to {self.word}, and its tensor names another number of units")
        shared: list[int] = []
        if self.shared_width is not None:
            name = shared_neurons_name(self.index)
            shared = plan_tensor(tensors, name, (info.shared_width,), why).nonzero()[:, 0].tolist()
        block = self._narrowed(layer, places_of_kept(kept_EI), shared)
        if self.refitted:
            units = HiddenUnits(layer.experts)
            columns_EWD = units.down_columns()
            size = columns_EWD.transpose(1, 2).shape
            units.set_down(plan_tensor(tensors, down_proj_name(self.index), tuple(size), why))
        return block

    def _widths(self, layer: MoELayer) -> tuple[int, ...]:
        number = layer.info.num_experts
        return self.widths if len(self.widths) > 1 else self.widths * number

    def _narrowed(self, layer: MoELayer, kept_EW: Tensor, shared: Any) -> nn.Module:
        from moe_lab.models.narrowing import narrow_experts, narrow_shared

        narrow_experts(layer, kept_EW)
        if self.shared_width is not None:
            narrow_shared(layer, shared)
        return layer.block
