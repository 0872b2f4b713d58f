"""Ratios that say how wide each expert stays, and not how much of a layer stays in all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from moe_lab.methods.ratios.budget import Budget, Scores, by_index
from moe_lab.methods.ratios.neurons import Neurons
from moe_lab.profile.profile import Profile
from moe_lab.types import LayerInfo, UserError


@dataclass(frozen=True)
class WidthBudget(Budget):
    """A budget of hidden units, whose share each expert gets by `widths` of the ratio.

    round_to: widths are multiples of it, or whole; floor: the narrowest width of an expert.
    """

    decides_widths = True

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse units that are no hidden units of single experts, and impossible widths."""
        if not all(isinstance(info, Neurons) and info.each == 1 for info in layers):
            raise UserError(
                f"ratio={type(self).__name__.lower()} says how wide each expert stays: ask for "
                "method.unit=neurons method.widths=by_expert, or for another ratio"
            )
        super().check(layers)
        if self.least % self.round_to:
            raise UserError(
                f"ratio.floor={self.floor} is no multiple of ratio.round_to={self.round_to}, which "
                f"widths are: ratio.floor={math.ceil(self.least / self.round_to) * self.round_to}"
            )
        self.check_something(layers)

    @property
    def least(self) -> int:
        """The narrowest width of an expert."""
        return self.floor or 0

    def numbers(self, scores: Scores, profile: Profile) -> NoReturn:
        """Nothing: `widths` says it."""
        raise RuntimeError(f"{type(self).__name__} decides widths")

    def notes(self, scores: Scores, numbers: Mapping[int, int]) -> dict[str, Any]:
        """kept_per_layer: hidden units that stay in each layer."""
        return {"kept_per_layer": by_index(numbers)}


def aligned_widths(width_E: Tensor, width: int, multiple: int) -> Tensor:
    """Widths [E] as multiples: rounded down, and spare blocks to the largest remainders.

    An expert may stay as wide as it is (`width`), whatever the multiple. The sum becomes no larger;
    ties put the lower expert first.
    """
    rounded_E = torch.where(width_E == width, width, width_E // multiple * multiple)
    remainder_E = width_E - rounded_E
    spare = int(remainder_E.sum())
    for expert in remainder_E.argsort(descending=True, stable=True).tolist():
        block = min(multiple, width - int(rounded_E[expert]))
        if block <= spare and remainder_E[expert] > 0:
            rounded_E[expert] += block
            spare -= block
    return rounded_E
