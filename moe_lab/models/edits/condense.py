"""The layer becomes one dense MLP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_lab.models.edits.base import Edit, Fate, GatedParts

if TYPE_CHECKING:
    from torch import Tensor, nn

    from moe_lab.models.layers import Standing


@dataclass(frozen=True)
class CondenseLayer(Edit):
    """shared_gate * shared(x) + sum of gates[i] * expert[experts[i]](x) (CD-MoE, 2412.00069).

    divergence: the search's value with no routed expert, then after each choice. widths: the hidden
    units of each part in that order, the shared part first where there is one.
    """

    experts: tuple[int, ...] = ()
    gates: tuple[float, ...] = ()
    shared_gate: float = 1.0
    divergence: tuple[float, ...] = ()
    widths: tuple[int, ...] = ()

    kind = "condense"
    leaves_moe = False
    trains = "all"
    joined = ("part of the condensed layer", "order of choice")

    def restructure(self, standing: Standing, tensors: Mapping[str, Tensor]) -> nn.Module:
        """The dense MLP, its weights those of its parts; or one wide expert in its own block."""
        from moe_lab.models.condensing import condensed

        layer = self.moe_layer(standing)
        return condensed(layer, self.experts, self.gates, self.shared_gate)

    @property
    def cells(self) -> dict[str, list[Any]]:
        """The gates."""
        return {"gates": [["shared", self.shared_gate], *self.gates]}

    @property
    def experts_kept(self) -> tuple[int, ...] | None:
        """The parts of the MLP that were routed experts."""
        return self.experts

    @property
    def gated_parts(self) -> GatedParts | None:
        """The shared part and each expert; no widths in plans that do not say them."""
        return GatedParts(self.widths, len(self.experts))

    def fate(self, expert: int) -> Fate:
        """A part of the MLP, by its place in the order of choice, or removed."""
        if expert not in self.experts:
            return Fate("removed")
        return Fate("joined", self.experts.index(expert) + 1)
