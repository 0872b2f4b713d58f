"""LExI (2509.02753): each layer its own number of experts per token, under one budget.

With D_l(k) how far the layer's output is from what it was with k experts for each token, the
numbers minimise sum D_l(k_l) where sum k_l = B and 1 <= k_l <= K. The paper searches by evolution;
here the optimum is found exactly, by dynamic programming. No code of the authors is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from moe_lab.methods.skipping.base import SkipRule
from moe_lab.models.edits.base import Edit
from moe_lab.profile.fewer_experts import damage_on_random, damage_on_text
from moe_lab.profile.profile import Profile
from moe_lab.types import LayerInfo, UserError


class Lexi(SkipRule):
    """The budget is B = average_top_k * layers, rounded."""

    takes = ("average_top_k", "inputs", "damage", "num_inputs", "num_samples")
    defaults: ClassVar = {"inputs": "random", "damage": "norm", "num_inputs": 1024}
    told = "each layer its own number of experts per token, sum D_l(k_l) minimal under the budget"

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse no budget, and options of the other inputs."""
        super().check(layers)
        if self.options.average_top_k is None:
            most = max(info.top_k for info in layers)
            raise UserError(
                "method.rule=lexi spends a budget: give method.average_top_k, experts per token on "
                f"average over the layers, from 1 to {most}"
            )
        if self.option("damage") == "relative" and self.option("inputs") != "text":
            raise UserError(
                "method.damage=relative holds a layer's error against the state that leaves it, "
                "and random inputs have none: ask for method.inputs=text"
            )
        other = "num_samples" if self.option("inputs") == "random" else "num_inputs"
        if getattr(self.options, other) is not None:
            raise UserError(f"method.{other} is no option of method.inputs={self.option('inputs')}")

    def edits(self, profile: Profile) -> tuple[Edit, ...]:
        """Each layer with its number."""
        infos = [one.info for one in profile.statistics]
        damage = self._damage(profile)
        numbers = cheapest([damage[info.index] for info in infos], self._budget(infos))
        return tuple(
            self.fixed(info, number, damage[info.index])
            for info, number in zip(infos, numbers, strict=True)
        )

    def _damage(self, profile: Profile) -> dict[int, list[float]]:
        """D_l(k) of each layer."""
        if self.option("inputs") == "random":
            return damage_on_random(profile, self.option("num_inputs"), self.options.seed)
        relative = self.option("damage") == "relative"
        return damage_on_text(profile, self.options.num_samples, relative)

    def _budget(self, layers: Sequence[LayerInfo]) -> int:
        most = sum(info.top_k for info in layers)
        average = self.options.average_top_k or 1.0
        return max(len(layers), min(most, math.floor(average * len(layers) + 0.5)))

    def example(self, layers: Sequence[LayerInfo]) -> tuple[Edit, ...]:
        """The budget as it would be given out in turn, the first layers first."""
        rest, numbers = self._budget(layers) - len(layers), dict.fromkeys(range(len(layers)), 1)
        while rest:
            for place, info in enumerate(layers):
                if rest and numbers[place] < info.top_k:
                    numbers[place], rest = numbers[place] + 1, rest - 1
        return tuple(self.fixed(info, numbers[place]) for place, info in enumerate(layers))

    def passes(self, layers: Sequence[LayerInfo]) -> float:
        """Of text one, and one for each k, which computes k of K experts; none of random inputs."""
        most = max(info.top_k for info in layers)
        return 1.0 + (most + 1) / 2 if self.option("inputs") == "text" else 0.0

    def foresees_form(self) -> bool:
        """Not where numbers may differ: the family's own form has one."""
        return self.options.renormalize is not None

    def notes(self) -> dict[str, Any]:
        """With the budget and the inputs."""
        told: dict[str, Any] = {"average_top_k": self.options.average_top_k}
        told |= {name: self.option(name) for name in ("inputs", "damage")}
        return super().notes() | told


def cheapest(damage: Sequence[Sequence[float]], budget: int) -> list[int]:
    """The numbers k_l with sum k_l = budget and the least sum of damage[l][k_l - 1]: exact.

    By dynamic programming over the layers; of equal ones the one with fewer in earlier layers.
    ValueError for a budget that no numbers have.
    """
    if not len(damage) <= budget <= sum(map(len, damage)):
        raise ValueError(f"no numbers for {len(damage)} layers add up to {budget}")
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for row in damage:
        found: dict[int, tuple[float, tuple[int, ...]]] = {}
        for spent, (cost, numbers) in best.items():
            for number, value in enumerate(row, start=1):
                one = cost + value, (*numbers, number)
                if spent + number <= budget and one < found.get(spent + number, (math.inf, ())):
                    found[spent + number] = one
        best = found
    return list(best[budget][1])
