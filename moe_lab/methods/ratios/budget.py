"""Pruning ratios: how many experts stay, per layer.

A ratio has `check(layers)`, which refuses an impossible request before any work, and
`numbers(scores, profile)`, how many experts each layer keeps, by layer index. It may have
`notes(scores, numbers)`, facts about its decision for the plan; `identity(options)`, what of its
options the numbers depend on; `code()`, the modules that decide them beside itself; and
`takes_groups`, false where it looks at the model on the whole calibration set. `scores`
are one score for each expert, by some metric of the intact model: which experts stay is their
order (`best`). `Budget` is the base of those that are told how much goes in all.

Routers that work on groups keep the same number in each, so that what stays or goes is a unit: one
expert of each group, the r-th best of each together. Elsewhere a unit is one expert.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from moe_lab.models.layers import check_kept
from moe_lab.profile.profile import Profile
from moe_lab.types import LayerInfo, UserError

Scores = Sequence[tuple[LayerInfo, Tensor]]
BUDGET_UNITS = ("experts", "parameters", "bytes")
GIB = 2**30


class Ratio(Protocol):
    """How many experts stay; its options are its fields."""

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse an impossible request before any work, with a UserError."""

    def numbers(self, scores: Scores, profile: Profile) -> Mapping[int, int]:
        """How many experts each layer keeps, by layer index."""
        ...


class Numbers(dict[int, int]):
    """How many experts each layer keeps, by layer index; found: what a search tells of them."""

    def __init__(self, numbers: Mapping[int, int], found: dict[str, Any]):
        super().__init__(numbers)
        self.found = found


def units(info: LayerInfo, score_E: Tensor) -> list[tuple[int, ...]]:
    """The experts of a layer in units, best first; ties put the lower expert first."""
    size = info.num_experts // info.groups
    order = score_E.view(info.groups, size).argsort(dim=1, descending=True, stable=True).tolist()
    by_group = [[group * size + expert for expert in row] for group, row in enumerate(order)]
    return list(zip(*by_group, strict=True))


def best(info: LayerInfo, score_E: Tensor, num_kept: int) -> tuple[int, ...]:
    """The experts of the best units that hold `num_kept` together, in ascending order."""
    chosen = units(info, score_E)[: num_kept // info.groups]
    return tuple(sorted(expert for unit in chosen for expert in unit))


def kept(scores: Scores, numbers: Mapping[int, int]) -> dict[int, tuple[int, ...]]:
    """The best `numbers[index]` experts of each layer, in ascending order, by layer index."""
    return {info.index: best(info, score, numbers[info.index]) for info, score in scores}


def by_index(numbers: Mapping[int, Any]) -> dict[str, Any]:
    """Values by layer index with the keys that JSON has."""
    return {str(index): value for index, value in numbers.items()}


def floor_of(info: LayerInfo, floor: int | None) -> int:
    """The fewest experts that the layer keeps: `floor`, or as few as its router can work with.

    Raises UserError for a floor above the layer's experts, or one that its router cannot work with.
    """
    if floor is None:
        per_group = math.ceil(info.top_k / info.groups_used)
        return info.top_k if info.groups == 1 else info.groups * max(2, per_group)
    if floor > info.num_experts:
        raise UserError(
            f"ratio.floor={floor}: layer {info.index} has only {info.num_experts} experts"
        )
    try:
        check_kept(info, floor)
    except UserError as error:
        raise UserError(
            f"ratio.floor={floor} is too low or uneven: {error}. ratio.floor=null keeps at least "
            "what each router needs"
        ) from error
    return floor


@dataclass(frozen=True)
class Budget:
    """How much goes in all, and how few experts a layer may keep.

    ratio: the share removed, in [0, 1), `of` the routed experts, or of the whole model's parameters
    or bytes (of which only experts go). target_gib: in the place of `ratio`, the GiB that the
    model's weights may take as saved. floor: every layer keeps at least so many (null: as few as
    its router can work with). round_to: every layer keeps a multiple of it. What stays of a share
    is rounded to the nearest number, and of a target downwards. Router rows count as gone with
    their experts: where they stay (method.replacement, merges with router=all) they come on top, as
    do constants: less than one hidden unit for each expert that goes.
    """

    ratio: float
    floor: int | None = None
    of: str = "experts"
    target_gib: float | None = None
    round_to: int = 1

    def identity(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options that decide: a target takes the place of a share."""
        unused = ("ratio", "of") if self.target_gib is not None else ()
        return {name: value for name, value in options.items() if name not in unused}

    def check_options(self) -> None:
        """Refuse values that no model could meet."""
        if not 0 <= self.ratio < 1:
            raise UserError(
                f"ratio.ratio={self.ratio}: the share of experts removed is at least 0, below 1"
            )
        if self.of not in BUDGET_UNITS:
            raise UserError(
                f"ratio.of={self.of!r} does not exist; there are {', '.join(BUDGET_UNITS)}"
            )
        if self.target_gib is not None and not self.target_gib > 0:
            raise UserError(f"ratio.target_gib={self.target_gib}: it must be above 0")
        if self.round_to < 1:
            raise UserError(f"ratio.round_to={self.round_to}: it must be at least 1")

    def multiple(self, layers: Sequence[LayerInfo]) -> int:
        """What every layer's number is a multiple of, for round_to and for the routers' groups."""
        return math.lcm(self.round_to, *(info.groups for info in layers))

    def choices(self, info: LayerInfo, step: int) -> range:
        """The numbers of experts that the layer may keep; UserError where there are none."""
        floor = floor_of(info, self.floor)
        possible = range(math.ceil(floor / step) * step, info.num_experts // step * step + 1, step)
        if not possible:
            raise UserError(
                f"ratio.round_to={self.round_to}: layer {info.index} keeps at least {floor} of "
                f"{info.num_experts} experts, and no multiple of {step} is among these numbers"
            )
        return possible

    def stays(self, number: int, step: int, layers: Sequence[LayerInfo]) -> int:
        """How many of `number` experts of these layers stay, a multiple of `step`."""
        most = number // step * step
        if self.target_gib is not None:
            size = sum(info.num_experts * info.expert_bytes for info in layers)
            room = size - layers[0].model_bytes + math.floor(self.target_gib * GIB)
            return min(most, number * room // size // step * step)
        gone = number * self._share_of_experts(layers)
        return min(most, most - step * math.floor((gone - number % step) / step + 0.5))

    def total(self, layers: Sequence[LayerInfo]) -> int:
        """How many experts the layers keep together; UserError for fewer than they can."""
        self.check_options()
        sizes = sorted({info.expert_bytes for info in layers})
        if len(sizes) > 1 and (self.of != "experts" or self.target_gib is not None):
            raise UserError(
                f"experts of different layers take {sizes} bytes, so that a size says no number "
                "of experts that layers could share: ask for ratio.ratio=<share> of the experts "
                "(ratio.of=experts ratio.target_gib=null)"
            )
        step = self.multiple(layers)
        choices = [self.choices(info, step) for info in layers]
        least, most = sum(one[0] for one in choices), sum(one[-1] for one in choices)
        everything = sum(info.num_experts for info in layers)
        number = min(most, self.stays(everything, step, layers))
        if number < least:
            why = "what their routers need" if self.floor is None else "ratio.floor"
            raise UserError(
                f"{self.asked()}: {max(0, number)} of {everything} experts would stay, but the "
                f"{len(layers)} MoE layers keep at least {least} together ({why}). "
                f"{self.possible(layers)}"
            )
        return number

    def asked(self) -> str:
        """What is refused, to begin a message with."""
        if self.target_gib is not None:
            return f"ratio.target_gib={self.target_gib} is too little"
        of = f" ratio.of={self.of}" if self.of != "experts" else ""
        return f"ratio.ratio={self.ratio}{of} is too much"

    def possible(self, layers: Sequence[LayerInfo]) -> str:
        """How much may go, to end a message with."""
        step = self.multiple(layers)
        gone = [(info, info.num_experts - self.choices(info, step)[0]) for info in layers]
        if self.target_gib is not None:
            now = layers[0].model_bytes
            least = now - sum(number * info.expert_bytes for info, number in gone)
            return f"The model has {_gib(now)} GiB now, and can have as little as {_gib(least)} GiB"
        share = sum(number * self._size(info) for info, number in gone) / self._whole(layers)
        return f"At most {math.floor(10_000 * share) / 10_000:.4g} can be removed"

    def _share_of_experts(self, layers: Sequence[LayerInfo]) -> float:
        if self.of == "experts":
            return self.ratio
        experts = sum(info.num_experts * self._size(info) for info in layers)
        return self.ratio * self._whole(layers) / experts

    def _size(self, info: LayerInfo) -> int:
        sizes = {"parameters": info.expert_parameters, "bytes": info.expert_bytes}
        return sizes.get(self.of, 1)

    def _whole(self, layers: Sequence[LayerInfo]) -> int:
        sizes = {"parameters": layers[0].model_parameters, "bytes": layers[0].model_bytes}
        return sizes.get(self.of) or sum(info.num_experts for info in layers)


def _gib(size: int) -> str:
    """With four digits, the last one rounded up, so that it can be asked for."""
    digits = 3 - math.floor(math.log10(size / GIB))
    return f"{math.ceil(size / GIB * 10**digits) / 10**digits:.10g}"
