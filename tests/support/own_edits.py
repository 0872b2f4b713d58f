"""Kinds of edits from outside the package, as somebody would write them: a file of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_lab.models.editing import DenseMLP
from moe_lab.models.edits.base import Edit, Fate
from moe_lab.models.layers import MoELayer, Standing
from moe_lab.types import LayerInfo, UserError


@dataclass(frozen=True)
class ScaleExperts(Edit):
    """The experts' outputs times a factor: no shape changes."""

    factor: float = 1.0

    kind = "scale_experts"
    trains = "experts"

    def apply(self, standing: Standing, tensors: Mapping[str, Tensor]) -> nn.Module:
        layer = self.moe_layer(standing)
        layer.experts.down_proj.mul_(self.factor)
        return layer.block


@dataclass(frozen=True)
class NarrowExperts(Edit):
    """Each expert keeps its first hidden units: other shapes in an MoE layer."""

    width: int = 1

    kind = "narrow_experts"

    def check(self, info: LayerInfo | None) -> None:
        super().check(info)
        if info is not None and not 0 < self.width <= info.expert_width:
            raise UserError(f"layer {info.index} has experts of {info.expert_width} hidden units")

    def restructure(self, standing: Standing, tensors: Mapping[str, Tensor]) -> nn.Module:
        return self.replay(standing, {"width": self.width})

    @classmethod
    def written(cls, standing: Standing) -> dict[str, Any] | None:
        if not isinstance(standing, MoELayer):
            return None
        width = vars(standing.experts).get("first_units")  # noted by `replay`, and nobody else
        return None if width is None else {"width": width}

    @classmethod
    def replay(cls, standing: Standing, written: dict[str, Any]) -> nn.Module:
        experts, width = standing.experts, written["width"]
        gate, up = experts.gate_up_proj.detach().chunk(2, dim=1)
        both = torch.cat([gate[:, :width], up[:, :width]], dim=1)
        down = experts.down_proj.detach()[:, :, :width].clone()
        experts.gate_up_proj, experts.down_proj = nn.Parameter(both), nn.Parameter(down)
        experts.first_units = width
        return standing.block


@dataclass(frozen=True)
class NarrowDense(Edit):
    """A dense MLP keeps its first hidden units: for layers that were condensed before."""

    width: int = 1

    kind = "narrow_dense"
    leaves_moe = False

    def check(self, info: LayerInfo | None) -> None:
        if info is not None:
            raise UserError(f"layer {info.index} is an MoE layer: condense it first")

    def restructure(self, standing: Standing, tensors: Mapping[str, Tensor]) -> nn.Module:
        if not isinstance(standing, DenseMLP):
            raise UserError(f"layer {self.index} is no dense MLP")
        for linear in (standing.gate_proj, standing.up_proj):
            linear.weight = nn.Parameter(linear.weight[: self.width].clone())
        standing.down_proj.weight = nn.Parameter(standing.down_proj.weight[:, : self.width].clone())
        return standing


class Constant(nn.Module):
    """Gives the same vector [D] for every token."""

    def __init__(self, value_D: Tensor):
        super().__init__()
        self.value = nn.Parameter(value_D)

    def forward(self, x: Tensor) -> Tensor:
        return self.value.expand_as(x)


@dataclass(frozen=True)
class ConstantLayer(Edit):
    """A vector of the plan's tensors takes the layer's place: a block of a class of our own."""

    of_expert: int = 0

    kind = "constant_layer"
    leaves_moe = False
    trains = "all"
    gone = "replaced"
    joined = ("the expert it stands for", "its place")

    def restructure(self, standing: Standing, tensors: Mapping[str, Tensor]) -> nn.Module:
        written = {"hidden_size": self.moe_layer(standing).info.hidden_size}
        return self.replay(standing, written)

    def apply(self, standing: Standing, tensors: Mapping[str, Tensor]) -> nn.Module:
        reference = self.moe_layer(standing).experts.down_proj
        return Constant(tensors[f"layers.{self.index}.value"].to(reference))

    @classmethod
    def written(cls, standing: Standing) -> dict[str, Any] | None:
        return {"hidden_size": len(standing.value)} if isinstance(standing, Constant) else None

    @classmethod
    def replay(cls, standing: Standing, written: dict[str, Any]) -> nn.Module:
        like = standing.experts.down_proj
        return Constant(like.new_zeros(written["hidden_size"]))

    @property
    def experts_kept(self) -> tuple[int, ...] | None:
        return (self.of_expert,)

    @property
    def cells(self) -> dict[str, list[Any]]:
        return {"stands for": [["expert", self.of_expert]]}

    def fate(self, expert: int) -> Fate:
        return Fate("joined", 1) if expert == self.of_expert else Fate("removed")
