"""One ranking of the experts of all layers (ratio=global)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moe_lab.methods.ratios.budget import Budget, Scores, by_index, units
from moe_lab.profile.profile import Profile
from moe_lab.types import LayerInfo


@dataclass(frozen=True)
class Global(Budget):
    """Remove the experts with the lowest scores of all layers together, as many as `Budget` says.

    SEER-MoE (2404.05089), global: the N L scores are ranked as one list, of which the best M stay;
    ties go to the lower layer, then to the lower expert. Scores of different layers are compared as
    they are. What a floor gives to some layers is taken from the lowest-ranked experts of the
    others, so that the total is as asked. Of group-limited routers a unit (one expert of each
    group) is ranked by its mean score and counts with its size; with round_to, so many experts of
    a layer are ranked together, its best first.
    """

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse a ratio that leaves too few experts for the floors of all layers."""
        super().check(layers)
        self.check_something(layers)

    def numbers(self, scores: Scores, profile: Profile) -> dict[int, int]:
        """How many experts each layer keeps, by layer index."""
        step = self.multiple([info for info, _ in scores])
        return dict(self._numbers(scores, {i.index: self.choices(i, step)[0] for i, _ in scores}))

    def notes(self, scores: Scores, numbers: dict[int, int]) -> dict[str, Any]:
        """How many experts each layer keeps, and for each that the floor changed also without it.

        The keys are layer indices: kept_per_layer, and floor_changed with "without" and "with".
        """
        without = self._numbers(scores, {})
        changed = {
            str(index): {"without": without[index], "with": number}
            for index, number in numbers.items()
            if without[index] != number
        }
        return {"kept_per_layer": by_index(numbers), "floor_changed": changed}

    def _numbers(self, scores: Scores, floors: dict[int, int]) -> Counter[int]:
        """How many experts each layer keeps: its floor first, then by rank while there is room."""
        layers = [info for info, _ in scores]
        numbers = Counter(floors)
        room = self.total(layers) - numbers.total()
        passed: Counter[int] = Counter()
        for index, size in _ranked(scores, self.multiple(layers)):
            passed[index] += size
            if passed[index] <= floors.get(index, 0):
                continue
            if size > room:
                break
            numbers[index] += size
            room -= size
        return numbers


def _ranked(scores: Scores, step: int) -> Iterator[tuple[int, int]]:
    """Layer index and size of each `step` experts of all layers, best first; no smaller rest."""
    means, indices = [], []
    for info, score in sorted(scores, key=lambda one: one[0].index):
        order = [expert for unit in units(info, score) for expert in unit]
        whole = len(order) // step * step
        means.append(score.double()[order[:whole]].view(-1, step).mean(dim=1))
        indices += [info.index] * len(means[-1])
    ranked = torch.cat(means).argsort(descending=True, stable=True).tolist()
    return ((indices[place], step) for place in ranked)
