"""The same number of experts in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_lab.methods.ratios.budget import Budget, Scores, floor_of
from moe_lab.models.layers import check_kept
from moe_lab.profile.profile import Profile
from moe_lab.types import LayerInfo, UserError


@dataclass(frozen=True)
class Uniform(Budget):
    """Remove the same share of the experts of each layer, rounded to whole experts.

    A share of the model's parameters or bytes, or a memory target (`Budget`), says how large that
    share of the experts is.
    """

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse a ratio that leaves a router too few experts."""
        super().check(layers)
        of_layer = self.of == "experts" and self.target_gib is None
        for info in layers:
            try:
                self._check_number(info, self._number(info, layers))
            except UserError as error:
                possible = self.possible([info] if of_layer else layers)
                raise UserError(f"{self.asked()}: {error}. {possible}") from error
        self.check_something(layers)

    def kept(self, layers: Sequence[LayerInfo]) -> int:
        """How many experts all layers keep together; UserError where one keeps too few."""
        numbers = self.foreseen(layers)
        for info in layers:
            self._check_number(info, numbers[info.index])
        return sum(numbers.values())

    def _check_number(self, info: LayerInfo, number: int) -> None:
        check_kept(info, number)
        if number < floor_of(info, self.floor):
            raise UserError(
                f"layer {info.index}: {number} of {info.num_experts} {info.items} would stay, "
                f"fewer than ratio.floor={self.floor}{' of each expert' * (info.floors > 1)}"
            )

    def numbers(self, scores: Scores, profile: Profile) -> dict[int, int]:
        """How many experts each layer keeps, by layer index."""
        return self.foreseen([info for info, _ in scores])

    def foreseen(self, layers: Sequence[LayerInfo]) -> dict[int, int]:
        """The same: no score enters it."""
        return {info.index: self._number(info, layers) for info in layers}

    def _number(self, info: LayerInfo, layers: Sequence[LayerInfo]) -> int:
        """The nearest multiple to what is asked for, the next above where that is no floor."""
        exact = self.stays(info.num_experts, 1, layers)
        if self.target_gib is None and self.round_to == 1:
            return max(0, exact)
        step = self.multiple([info])
        number = max(0, self.stays(info.num_experts, step, layers))
        if self.target_gib is None and exact >= floor_of(info, self.floor):
            return max(number, self.choices(info, step)[0])
        return number
