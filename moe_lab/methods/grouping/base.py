"""Which experts of a layer become one, for method=merge.

A class each, in a file of its own. A grouping takes a layer's statistics, and where it asks for
that a matrix over its experts found from all their outputs; it gives the experts that stay, who
joins them, and with which weights. Routers that work on groups of experts merge within each, and
keep the same number in each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moe_lab.chosen import ChosenBy, all_options
from moe_lab.methods.ratios import budget
from moe_lab.option import Plugin, check_options
from moe_lab.profile.all_experts import AllExperts
from moe_lab.profile.layer import LayerStatistics
from moe_lab.types import AlignName, LayerInfo, RouterName

BASES = ("alignment", "base")  # the files of this package that are no groupings
GROUPING_FILES = (str(__package__), *BASES)


@dataclass(frozen=True)
class MergeCandidates:
    """The experts of one layer of which `number` are to stay.

    outputs_EE: what the grouping's `outputs` found, None where it needs none.
    """

    statistics: LayerStatistics
    number: int
    outputs_EE: Tensor | None = None


@dataclass(frozen=True)
class Groups:
    """kept[i] becomes the average of the experts groups[i] (itself first) with weights[i]."""

    kept: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...]


class Grouping(Plugin, ABC):
    """A way to group experts, and how its paper goes on from there; its options are its fields.

    `choose` and `scores` have to be there. What else may be:
    choose(candidates): which experts stay, who joins them, and with which weights.
    scores(statistics): the experts' importance [E], by which a ratio says how many stay.
    scored_by: what the plan calls these scores; by default the grouping's name.
    align, router, propagate: the paper's, where the method's options leave them open; by default
    weights, all and false.
    needs_outputs: whether `choose` needs to know something of all experts' outputs, which every
    expert is then computed for on a sample; by default false. Then
    outputs(experts): a matrix [E, E] of it, and
    outputs_options: the options that it depends on; by default None, all.
    refits: whether the merged experts get down projections of their own making; by default false.
    Then down_projections(experts, groups): these [E', D, I], from all experts on the sample.
    check(info, number): refuses what is impossible for a layer of which `number` experts stay, with
    a UserError; by default values that are out of the range which their `Option` says.
    name: how reports call it; by default its file's name.
    """

    align: AlignName = "weights"
    router: RouterName = "all"
    propagate: bool = False
    needs_outputs: bool = False
    refits: bool = False
    outputs_options: tuple[str, ...] | None = None

    @property
    def name(self) -> str:
        """How reports call it."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def scored_by(self) -> str:
        """What the plan calls its scores."""
        return self.name

    @abstractmethod
    def choose(self, candidates: MergeCandidates) -> Groups:
        """Which experts stay, who joins them, and with which weights."""

    @abstractmethod
    def scores(self, statistics: LayerStatistics) -> Tensor:
        """The experts' importance [E]."""

    def outputs(self, experts: AllExperts) -> Tensor:
        """What `choose` needs to know of all experts' outputs, [E, E]."""
        raise NotImplementedError(f"{type(self).__name__} needs no outputs")

    def down_projections(self, experts: AllExperts, groups: Groups) -> Tensor:
        """The down projections [E', D, I] of the experts that stay."""
        raise NotImplementedError(f"{type(self).__name__} leaves the average as it is")

    def check(self, info: LayerInfo, number: int) -> None:
        """Refuse what is impossible for a layer of which `number` experts stay."""
        check_options(self, "grouping")


GROUPINGS: ChosenBy[Grouping] = ChosenBy("grouping", str(__package__), Grouping, BASES)


def as_grouping(given: Grouping | str) -> Grouping:
    """A grouping, also by name (a file of this package, or a dotted path), with its defaults."""
    return GROUPINGS.made(given)


def grouping_options(grouping: Grouping, given: object) -> dict[str, Any]:
    """All its own options; given: its composed node, or its name, which leaves the defaults."""
    return all_options(grouping, given)


def described(given: object) -> dict[str, Any]:
    """What a report says of a grouping: its name and its own options.

    given: as for `grouping_options`.
    """
    return GROUPINGS.described(given)


def grouped(
    info: LayerInfo, scores_E: Tensor, groups: Iterable[Sequence[int]], weight_E: Tensor
) -> Groups:
    """Each group under its expert with the highest score, weighted by its share of weight_E.

    The groups come in ascending order of those, ties of scores put the lower expert first, and the
    others follow in ascending order. A group without any weight weighs its experts alike.
    """
    place = {expert: place for place, expert in enumerate(experts_by_score(info, scores_E))}
    ordered = []
    for group in groups:
        first = min(group, key=place.__getitem__)
        ordered.append((first, *sorted(set(group) - {first})))
    ordered.sort()
    shares = tuple(_shares(weight_E[list(group)]) for group in ordered)
    return Groups(tuple(group[0] for group in ordered), tuple(ordered), shares)


def experts_by_score(info: LayerInfo, scores_E: Tensor) -> list[int]:
    """The experts by score, highest first within their router group; ties the lower expert."""
    return [expert for unit in budget.units(info, scores_E) for expert in unit]


def router_groups(info: LayerInfo) -> list[range]:
    """The experts of each group that the router works on; all of them where it has none."""
    size = info.num_experts // info.groups
    return [range(group * size, (group + 1) * size) for group in range(info.groups)]


def _shares(weight_G: Tensor) -> tuple[float, ...]:
    total = weight_G.sum()
    if total <= 0:
        return (1 / len(weight_G),) * len(weight_G)
    return tuple((weight_G / total).tolist())
