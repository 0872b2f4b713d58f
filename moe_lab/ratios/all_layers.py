"""One ranking of the experts of all layers (ratio=global)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from moe_lab.evidence import Evidence
from moe_lab.ratios import Scores, check_share, floor_of, units
from moe_lab.types import LayerInfo, UserError


@dataclass(frozen=True)
class Global:
    """Remove the share `ratio` of all experts: those with the lowest scores of all layers together.

    SEER-MoE (2404.05089), global: the N L scores are ranked as one list, of which the best M stay;
    ties go to the lower layer, then to the lower expert. Scores of different layers are compared as
    they are. floor: every layer keeps at least so many (null: as few as its router can work with);
    what this gives to some layers is taken from the lowest-ranked experts of the others, so that
    the total is as asked. Of group-limited routers a unit (one expert of each group) is ranked by
    its mean score and counts with its size.
    """

    ratio: float
    floor: int | None = None

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse a ratio that leaves too few experts for the floors of all layers."""
        check_share(self.ratio)
        least = sum(floor_of(info, self.floor) for info in layers)
        total = sum(info.num_experts for info in layers)
        if least > self._num_kept(layers):
            why = "what their routers need" if self.floor is None else "ratio.floor"
            most = math.floor(10_000 * (1 - least / total)) / 10_000
            raise UserError(
                f"ratio.ratio={self.ratio} is too much: {self._num_kept(layers)} of {total} "
                f"experts would stay, but the {len(layers)} MoE layers keep at least {least} "
                f"together ({why}). At most {most:.4g} can be removed"
            )

    def numbers(self, scores: Scores, evidence: Evidence) -> dict[int, int]:
        """How many experts each layer keeps, by layer index."""
        return dict(self._numbers(scores, {i.index: floor_of(i, self.floor) for i, _ in scores}))

    def notes(self, scores: Scores, numbers: dict[int, int]) -> dict[str, Any]:
        """How many experts each layer keeps, and for each that the floor changed also without it.

        The keys are layer indices: kept_per_layer, and floor_changed with "without" and "with".
        """
        without = self._numbers(scores, {})
        kept = {str(index): number for index, number in numbers.items()}
        changed = {
            index: {"without": without[int(index)], "with": number}
            for index, number in kept.items()
            if without[int(index)] != number
        }
        return {"kept_per_layer": kept, "floor_changed": changed}

    def _numbers(self, scores: Scores, floors: dict[int, int]) -> Counter[int]:
        """How many experts each layer keeps: its floor first, then by rank while there is room."""
        numbers = Counter(floors)
        room = self._num_kept([info for info, _ in scores]) - numbers.total()
        passed: Counter[int] = Counter()
        for index, size in _ranked(scores):
            passed[index] += size
            if passed[index] <= floors.get(index, 0):
                continue
            if size > room:
                break
            numbers[index] += size
            room -= size
        return numbers

    def _num_kept(self, layers: Sequence[LayerInfo]) -> int:
        """What is removed is rounded to whole units."""
        total, unit = sum(info.num_experts for info in layers), max(info.groups for info in layers)
        return total - unit * int(total * self.ratio / unit + 0.5)


def _ranked(scores: Scores) -> Iterator[tuple[int, int]]:
    """Layer index and size of each unit of all layers, best first."""
    ranked = [
        (-float(score[list(unit)].double().mean()), info.index, place, len(unit))
        for info, score in scores
        for place, unit in enumerate(units(info, score))
    ]
    return ((index, size) for _, index, _, size in sorted(ranked))
