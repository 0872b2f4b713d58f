"""All experts stay, their matrices computed from factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moe_lab.models.edits.base import Edit
from moe_lab.types import LayerInfo, UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from moe_lab.models.layers import Standing


@dataclass(frozen=True)
class FactorizeExperts(Edit):
    """Gate, up and down projection of every expert become factors; routing stays as it is.

    form: what made them. gate, up, down: which factors (`factors.Spec`: the kind, ranks, what is
    shared); their values are the plan's tensors "layers.<index>.factors.<matrix>.<factor>".
    parameters, of: how many all the factors have together, and the matrices had. error: the squared
    error of each matrix as a share of its squared size, on the calibration text where the form
    looked at it, else of the weights alone.
    """

    form: str = ""
    gate: Mapping[str, Any] = field(default_factory=dict, hash=False)
    up: Mapping[str, Any] = field(default_factory=dict, hash=False)
    down: Mapping[str, Any] = field(default_factory=dict, hash=False)
    parameters: int = 0
    of: int = 0
    error: tuple[float, ...] = ()

    kind = "factorize"
    leaves_moe = False
    trains = "all"

    @property
    def specs(self) -> dict[str, Mapping[str, Any]]:
        """Of each matrix."""
        return {"gate": self.gate, "up": self.up, "down": self.down}

    def check(self, info: LayerInfo | None) -> None:
        """Refuse factors that take no less than the matrices."""
        super().check(info)
        if self.parameters >= self.of:
            raise UserError(
                f"layer {self.index}: the factors would have {self.parameters:,} parameters, and "
                f"the experts have {self.of:,}: that costs more than it saves"
            )

    def restructure(self, standing: Standing, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Factors of these shapes in the place of the experts."""
        from moe_lab.models.factorized import put_factors

        layer = self.moe_layer(standing)
        put_factors(layer, self.specs)
        return layer.block

    def apply(self, standing: Standing, tensors: Mapping[str, Tensor]) -> nn.Module:
        """With the plan's values."""
        from moe_lab.models.editing import plan_tensor
        from moe_lab.models.factorized import factor_name, fill_factors, put_factors

        layer, why = self.moe_layer(standing), f"the plan factorises layer {self.index}"
        experts = put_factors(layer, self.specs)
        given = {
            matrix: {
                name: plan_tensor(
                    tensors, factor_name(self.index, matrix, name), tuple(tensor.shape), why
                )
                for name, tensor in factors.state_dict().items()
            }
            for matrix, factors in experts.factors.items()
        }
        fill_factors(experts, given)
        return layer.block

    @classmethod
    def written(cls, standing: Standing) -> dict[str, Any] | None:
        """The numbers of experts and of what they compute with, and the factors' shapes."""
        from torch import nn

        from moe_lab.models.factorized import factorized_in, written_factors

        found = factorized_in(standing) if isinstance(standing, nn.Module) else None
        return None if found is None else written_factors(found)

    @classmethod
    def replay(cls, standing: Standing, written: dict[str, Any]) -> nn.Module:
        """The same module, its values still to come."""
        from moe_lab.models.factorized import replayed
        from moe_lab.models.layers import MoELayer

        if not isinstance(standing, MoELayer):
            raise UserError("this checkpoint's config.json factorises a layer without experts")
        return replayed(standing, written)

    @property
    def title(self) -> str:
        """With the form, and what is left."""
        share = f" to {self.parameters / self.of:.0%}" if self.of else ""
        return f"factorize ({self.form}){share}"

    @property
    def cells(self) -> dict[str, list[Any]]:
        """Ranks and errors by matrix."""
        names = ("rank", "ranks", "bases", "base")
        told = [
            [matrix, *(f"{name} {spec[name]}" for name in names if spec.get(name) is not None)]
            for matrix, spec in self.specs.items()
        ]
        return {"factors": told, "error": [round(one, 5) for one in self.error]}
