"""As few experts of each layer as carry most of its score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from moe_lab.methods.ratios.budget import Ratio, Scores, floor_of, units
from moe_lab.option import Option
from moe_lab.profile.profile import Profile
from moe_lab.types import LayerInfo, UserError


@dataclass(frozen=True)
class Coverage(Ratio):
    """Keep in each layer the fewest experts whose scores sum to the share `coverage` of all.

    Task-level extraction, after the task-level MoE of 2110.03742, which serves a task by the
    sub-network of its experts: with the task's own text as calibration set and a counting metric,
    what stays is what that task uses. Of group-limited routers each group keeps the same number.
    """

    coverage: Annotated[float, Option("share of the scores that stays", above=0, most=1)]
    floor: Annotated[
        int | None,
        Option(
            "fewest experts of a layer, or hidden units of an expert; null: as few as its router "
            "can work with"
        ),
    ] = None

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse a share that is none, and an impossible floor."""
        super().check(layers)
        for info in layers:
            floor_of(info, self.floor)

    def numbers(self, scores: Scores, profile: Profile) -> dict[int, int]:
        """How many experts each layer keeps, by layer index; UserError for scores < 0."""
        numbers = {info.index: self._number(info, score) for info, score in scores}
        if self.coverage < 1 and all(numbers[info.index] == info.num_experts for info, _ in scores):
            raise UserError(
                f"ratio.coverage={self.coverage} removes nothing: every layer needs all its "
                f"{scores[0][0].items} for it. {self._most(scores)}; method=none leaves the model "
                "as it is"
            )
        return numbers

    def _most(self, scores: Scores) -> str:
        """The largest share for which a layer can do without some, in words."""
        shares = [
            ([0.0, *_covered(info, score)])[-2]
            for info, score in scores
            if info.num_experts - info.groups >= floor_of(info, self.floor)
        ]
        most = math.floor(10_000 * max(shares, default=0.0)) / 10_000
        return f"ratio.coverage={most:g} would remove some" if most else "Their routers need them"

    def notes(self, scores: Scores, numbers: dict[int, int]) -> dict[str, Any]:
        """How many experts each layer keeps, and the share of its score that they have."""
        shares = {info.index: [0.0, *_covered(info, score)] for info, score in scores}
        return {
            "kept_per_layer": {str(index): number for index, number in numbers.items()},
            "covered": {
                str(info.index): shares[info.index][numbers[info.index] // info.groups]
                for info, _ in scores
            },
        }

    def _number(self, info: LayerInfo, score: Tensor) -> int:
        if bool((score < 0).any()):
            raise UserError(
                f"ratio=coverage needs scores that are shares of something, and layer {info.index} "
                "has some below 0: choose another metric, such as metric=frequency"
            )
        number, floor = 0, floor_of(info, self.floor)
        for unit, covered in zip(units(info, score), [0.0, *_covered(info, score)], strict=False):
            # A rounding's width below: all shares together need not make 1 exactly.
            if number >= floor and covered >= self.coverage - 1e-12:
                break
            number += len(unit)
        return number


def _covered(info: LayerInfo, score: Tensor) -> list[float]:
    """The share of the layer's score that its best 1, 2, ... units have; 1 where it has none."""
    score = score.double()
    order = torch.tensor(units(info, score))
    if not score.sum() > 0:
        return [1.0] * len(order)
    shares: list[float] = (score[order].sum(dim=1).cumsum(0) / score.sum()).tolist()
    return shares
