"""The router of a layer chooses another number of experts for every token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_lab.models.edits.base import Edit
from moe_lab.types import LayerInfo, UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from moe_lab.models.layers import Standing


@dataclass(frozen=True)
class SetTopK(Edit):
    """A token gets `top_k` experts, whose weights are what the family makes of so many.

    damage: what a search knew, D(k) for k = 1, 2, ...; empty where there was none.
    """

    top_k: int = 1
    damage: tuple[float, ...] = ()

    kind = "top_k"
    keeps_experts_as_they_are = True
    trains = "experts"

    def to_json(self) -> dict[str, Any]:
        """Without what is not there."""
        values = super().to_json()
        return {name: value for name, value in values.items() if value != []}

    def check(self, info: LayerInfo | None) -> None:
        """Refuse more experts than the layer has, or than its groups let a token have."""
        super().check(info)
        if info is None:
            return
        most = info.num_experts // info.groups * info.groups_used
        if not 1 <= self.top_k <= most:
            raise UserError(
                f"layer {self.index}: {self.top_k} experts for each token, and it can have 1 to "
                f"{most} ({info.num_experts} experts in {info.groups} groups, of which "
                f"{info.groups_used} are used)"
                if info.groups > 1
                else f"layer {self.index}: {self.top_k} experts for each token, and it has "
                f"{info.num_experts} experts: a token can have 1 to {most}"
            )

    def left(self, info: LayerInfo) -> LayerInfo | None:
        """The layer with another number."""
        import dataclasses

        return dataclasses.replace(info, top_k=self.top_k)

    def restructure(self, standing: Standing, tensors: Mapping[str, Tensor]) -> nn.Module:
        """The same block; UserError where its router does not obey."""
        from moe_lab.models.routers import set_top_k_of

        layer = self.moe_layer(standing)
        if why := getattr(layer.experts, "keeps_top_k", None):
            raise UserError(f"layer {self.index}, {self.top_k} experts for each token: {why}")
        set_top_k_of(layer, self.top_k)
        return layer.block

    @property
    def title(self) -> str:
        """The kind, with the number."""
        return f"top_k {self.top_k}"

    @property
    def cells(self) -> dict[str, list[Any]]:
        """The number, and what a search knew of it."""
        told: dict[str, list[Any]] = {"experts per token": [self.top_k]}
        if self.damage:
            told["damage by k"] = [round(value, 5) for value in self.damage]
        return told
