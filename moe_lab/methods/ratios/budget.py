"""Pruning ratios: how many experts stay, per layer.

`Ratio` is what all are, `Budget` the base of those that are told how much goes in all. Which
experts of a layer stay is the order of their scores, by some metric of the intact model (`best`).

Routers that work on groups keep the same number in each, so that what stays or goes is a unit: one
expert of each group, the r-th best of each together. Elsewhere a unit is one expert.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor

from moe_lab.methods.ratios.neurons import Neurons
from moe_lab.methods.ratios.pairs import Pairs
from moe_lab.models.layers import check_kept
from moe_lab.option import Option, Plugin, check_options
from moe_lab.profile.profile import Profile
from moe_lab.types import LayerInfo, UserError

Scores = Sequence[tuple[LayerInfo, Tensor]]
BUDGET_UNITS = ("experts", "parameters", "bytes")
GIB = 2**30


class Ratio(Plugin, ABC):
    """How many experts stay; its options are its fields.

    Only `numbers` has to be there. What else may be:
    check(layers): refuses an impossible request before any work, with a UserError; by default
    values that are out of the range which their `Option` says.
    foreseen(layers): the numbers where they are known before any work; by default None.
    check_pairs(layers), pairs(scores, profile): the same where experts and hidden units go under
    one budget; by default refused.
    notes(scores, numbers): facts about its decision for the plan; by default none.
    decides_widths: whether it says by `widths(layers, profile)` how many hidden units each expert
    keeps, and not by `numbers` how many a layer keeps of all; by default false.
    decides_bits: whether what it chooses says in how many bits each layer is to be stored, too; by
    default false.
    takes_groups: whether a group's statistics are all that it looks at, and not the model on the
    whole calibration set; by default true.
    identity(options): what of its composed options the numbers depend on; by default all.
    """

    takes_groups: bool = True
    decides_widths: bool = False
    decides_bits: bool = False

    @abstractmethod
    def numbers(self, scores: Scores, profile: Profile) -> Mapping[int, int]:
        """How many experts each layer keeps, by layer index.

        scores: each layer's description, and one score for each of its experts.
        """

    def widths(
        self, layers: Sequence[tuple[Neurons, Tensor]], profile: Profile
    ) -> Mapping[int, Tensor]:
        """How many hidden units each expert keeps [E], by layer index.

        layers: each with the scores [E, I] of its hidden units.
        """
        raise NotImplementedError(f"{type(self).__name__} decides no widths")

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse an impossible request before any work, with a UserError."""
        check_options(self, "ratio")

    def check_pairs(self, layers: Sequence[LayerInfo]) -> None:
        """The same where experts and hidden units go; by default that is refused."""
        raise UserError(
            "method.unit=both weighs experts against hidden units by what the model loses with "
            "fewer of each, which ratio=sensitivity measures: ask for it, or for "
            "method.unit=neurons"
        )

    def pairs(self, scores: Scores, profile: Profile) -> Pairs:
        """How many experts each layer keeps and how wide they stay, by layer index.

        scores: a score for each hidden unit of each expert [E, I].
        """
        raise NotImplementedError(f"{type(self).__name__} has no pairs")

    def foreseen(self, layers: Sequence[LayerInfo]) -> Mapping[int, int] | None:
        """How many experts each layer keeps, where that is known before any work."""
        return None

    def notes(self, scores: Scores, numbers: Any) -> dict[str, Any]:
        """Facts about the decision, for the plan; numbers: what `numbers` gave."""
        return {}

    def told(self, layers: Sequence[LayerInfo], numbers: Mapping[int, int]) -> dict[str, Any]:
        """What goes, for the plan and the report: "given", and "asked" where a size was asked for.

        given: ratio, the share of these layers' experts that goes; experts, in words, or
        hidden_units where these go.
        """
        gone, everything = _gone(layers, numbers), sum(info.num_experts for info in layers)
        what = "hidden_units" if isinstance(layers[0], Neurons) else "experts"
        size, items = together(layers)
        words = f"{size * gone} of {size * everything} {items}"
        return {"given": {"ratio": gone / everything, what: words.removesuffix(" experts")}}


class Numbers(dict[int, int]):
    """How many experts each layer keeps, by layer index; found: what a search tells of them."""

    def __init__(self, numbers: Mapping[int, int], found: dict[str, Any]):
        super().__init__(numbers)
        self.found = found


def units(info: LayerInfo, score_E: Tensor) -> list[tuple[int, ...]]:
    """The experts of a layer in units, best first; ties put the lower expert first."""
    size = info.num_experts // info.groups
    if isinstance(info, Neurons):  # written in this order
        return [(item,) for item in range(size)]
    order = score_E.view(info.groups, size).argsort(dim=1, descending=True, stable=True).tolist()
    by_group = [[group * size + expert for expert in row] for group, row in enumerate(order)]
    return list(zip(*by_group, strict=True))


def together(layers: Sequence[LayerInfo]) -> tuple[int, str]:
    """Where the items of several layers are summed: how many things one is, and their name.

    One of `Neurons` may be a hidden unit of each of a layer's experts.
    """
    if not isinstance(layers[0], Neurons):
        return 1, layers[0].items
    sizes = {info.each for info in layers if isinstance(info, Neurons)}
    return (sizes.pop(), "hidden units") if len(sizes) == 1 else (1, layers[0].items)


Kept = tuple[int, ...] | Tensor  # experts, or the hidden units of all of them [E, I]


def best(info: LayerInfo, score_E: Tensor, num_kept: int) -> Any:
    """The experts of the best units that hold `num_kept` together, in ascending order.

    Of `Neurons` the hidden units [E, I] (bool).
    """
    if isinstance(info, Neurons):
        return info.kept(num_kept)
    chosen = units(info, score_E)[: num_kept // info.groups]
    return tuple(sorted(expert for unit in chosen for expert in unit))


def order_of(info: LayerInfo, score_E: Tensor) -> Any:
    """What the order in which a layer's items stay is known by, as JSON has it."""
    return info.known_by() if isinstance(info, Neurons) else units(info, score_E)


def kept(scores: Scores, numbers: Mapping[int, int]) -> dict[int, Any]:
    """The best `numbers[index]` experts of each layer, in ascending order, by layer index.

    Of `Neurons` the hidden units [E, I] (bool).
    """
    return {info.index: best(info, score, numbers[info.index]) for info, score in scores}


def by_index(numbers: Mapping[int, Any]) -> dict[str, Any]:
    """Values by layer index with the keys that JSON has."""
    return {str(index): value for index, value in numbers.items()}


def floor_of(info: LayerInfo, floor: int | None) -> int:
    """The fewest experts that the layer keeps: `floor`, or as few as its router can work with.

    Raises UserError for a floor above the layer's experts, or one that its router cannot work with.
    """
    if isinstance(info, Neurons):
        floor = max(1, (floor or 0) * info.floors)
        if floor > info.num_experts:
            raise UserError(
                f"ratio.floor={floor // info.floors}: the experts of layer {info.index} have only "
                f"{info.num_experts // info.floors} hidden units"
            )
        return floor
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
class Budget(Ratio):
    """How much goes in all, and how few experts a layer may keep.

    Of the whole model's parameters or bytes only experts go. What stays of a share is rounded to
    the nearest number, and of a target downwards. Router rows count as gone with their experts:
    where they stay (method.replacement, merges with router=all) they come on top, as do constants:
    less than one hidden unit for each expert that goes.
    """

    ratio: Annotated[float, Option("share that goes", least=0, below=1)]
    floor: Annotated[
        int | None,
        Option(
            "fewest experts of a layer, or hidden units of an expert; null: as few as its router "
            "can work with"
        ),
    ] = None
    of: Annotated[
        str,
        Option("the share is of the routed experts, or of the whole model's", among=BUDGET_UNITS),
    ] = "experts"
    target_gib: Annotated[
        float | None,
        Option("in the place of ratio: GiB that the model's weights take as saved", above=0),
    ] = None
    round_to: Annotated[int, Option("every layer keeps a multiple of it", least=1)] = 1

    def identity(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options that decide: a target takes the place of a share."""
        unused = ("ratio", "of") if self.target_gib is not None else ()
        return {name: value for name, value in options.items() if name not in unused}

    def told(self, layers: Sequence[LayerInfo], numbers: Mapping[int, int]) -> dict[str, Any]:
        """What was asked for and what is given, in the same unit: ratio, or target_gib."""
        given = super().told(layers, numbers)["given"]
        if self.target_gib is not None:
            size = layers[0].model_bytes - sum(
                (info.num_experts - numbers[info.index]) * info.expert_bytes for info in layers
            )
            given = {"target_gib": size / GIB} | {k: v for k, v in given.items() if k != "ratio"}
            return {"asked": {"target_gib": self.target_gib}, "given": given}
        if self.of != "experts":
            given["ratio"] = sum(
                (info.num_experts - numbers[info.index]) * self._size(info) for info in layers
            ) / self._whole(layers)
        return {"asked": {"ratio": self.ratio}, "given": given}

    def kept(self, layers: Sequence[LayerInfo]) -> int:
        """How many experts the layers keep together, which no score decides."""
        return self.total(layers)

    def check_something(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse a share of which whole experts and multiples leave nothing; 0 is no such share."""
        everything = sum(info.num_experts for info in layers)
        if (self.ratio == 0 and self.target_gib is None) or self.kept(layers) < everything:
            return
        multiple = f", in multiples of ratio.round_to={self.round_to}" * (self.round_to > 1)
        ways = [self._least(layers), self._smaller_multiple(layers)]
        size, items = together(layers)
        needed = "Its routers need all of them" if items == "experts" else "Nothing less is there"
        if self.target_gib is not None:
            ways = [f"{self.possible(layers)}: ask for less than it has"]
        raise UserError(
            f"{self.request()} removes nothing: all {size * everything} {items} of "
            f"{len(layers)} MoE layers would stay{multiple}. "
            + ("; or ".join(filter(None, ways)) or needed)
            + ". method=none leaves the model as it is"
        )

    def _least(self, layers: Sequence[LayerInfo]) -> str | None:
        """The smallest share that removes an expert, in words."""
        whole, everything = self._whole(layers), sum(info.num_experts for info in layers)
        size = min(self._size(info) for info in layers)
        for number in range(1, everything):
            share = math.ceil(10_000 * number * size / whole) / 10_000
            if share > self.ratio and share < 1 and (gone := self._would_go(layers, ratio=share)):
                size, _ = together(layers)
                return f"ratio.ratio={share:g} would remove {size * gone} of them"
        return None

    def _smaller_multiple(self, layers: Sequence[LayerInfo]) -> str | None:
        """The largest smaller round_to with which something goes, in words."""
        for number in range(self.round_to - 1, 0, -1):
            if gone := self._would_go(layers, round_to=number):
                size, _ = together(layers)
                return f"ratio.round_to={number} would remove {size * gone} of them"
        return None

    def _would_go(self, layers: Sequence[LayerInfo], **changes: Any) -> int:
        """How many experts would go with other options; 0 where that is refused."""
        try:
            kept = dataclasses.replace(self, **changes).kept(layers)
        except UserError:
            return 0
        return sum(info.num_experts for info in layers) - kept

    def multiple(self, layers: Sequence[LayerInfo]) -> int:
        """What every layer's number is a multiple of, for round_to and for the routers' groups."""
        return math.lcm(self.round_to, *(info.groups for info in layers))

    def stride(self, layers: Sequence[LayerInfo], most: int) -> int:
        """By how many items a search moves: so that a layer of hidden units has `most` numbers.

        Of experts it is `multiple`.
        """
        multiple = self.multiple(layers)
        if not isinstance(layers[0], Neurons):
            return multiple
        return multiple * math.ceil(max(info.num_experts for info in layers) / multiple / most)

    def choices(self, info: LayerInfo, step: int) -> range:
        """The numbers of experts that the layer may keep; UserError where there are none."""
        floor = floor_of(info, self.floor)
        possible = range(math.ceil(floor / step) * step, info.num_experts // step * step + 1, step)
        if not possible:
            raise UserError(
                f"ratio.round_to={self.round_to}: layer {info.index} keeps at least {floor} of "
                f"{info.num_experts} {info.items}, and no multiple of {step} is among these numbers"
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
            size, items = together(layers)
            needed = "what their routers need" if items == "experts" else "one of each expert"
            if layers[0].floors > 1:
                needed = "one in each layer"
            why = needed if self.floor is None else f"ratio.floor={self.floor}"
            why += f", in multiples of {step}" * (step > 1)
            raise UserError(
                f"{self.asked()}: {size * max(0, number)} of {size * everything} {items} would "
                f"stay, but the {len(layers)} MoE layers keep at least {size * least} together "
                f"({why}). "
                f"{self.possible(layers)}"
            )
        return number

    def asked(self) -> str:
        """What is refused, to begin a message with."""
        return f"{self.request()} is too {'much' if self.target_gib is None else 'little'}"

    def request(self) -> str:
        """What was asked for, as a user writes it."""
        if self.target_gib is not None:
            return f"ratio.target_gib={self.target_gib}"
        of = f" ratio.of={self.of}" if self.of != "experts" else ""
        return f"ratio.ratio={self.ratio}{of}"

    def possible(self, layers: Sequence[LayerInfo]) -> str:
        """How much may go, to end a message with."""
        step = self.multiple(layers)
        gone = [(info, info.num_experts - self.choices(info, step)[0]) for info in layers]
        if self.target_gib is not None:
            now = layers[0].model_bytes
            least = now - sum(number * info.expert_bytes for info, number in gone)
            return f"The model has {_gib(now)} GiB now, and can have as little as {_gib(least)} GiB"
        share = sum(number * self._size(info) for info, number in gone) / self._whole(layers)
        if not share:
            smaller = self._smaller_multiple(layers)
            return f"In multiples of {step} nothing can be removed" + f"; {smaller}" * bool(smaller)
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


def _gone(layers: Sequence[LayerInfo], numbers: Mapping[int, int]) -> int:
    return sum(info.num_experts - numbers[info.index] for info in layers)


def _gib(size: int) -> str:
    """With four digits, the last one rounded up, so that it can be asked for."""
    digits = 3 - math.floor(math.log10(size / GIB))
    return f"{math.ceil(size / GIB * 10**digits) / 10**digits:.10g}"
