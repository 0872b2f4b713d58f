"""Which experts of a layer become one, for method=merge.

One file each, with one `GROUPING`, found by its file's name. A grouping takes a layer's statistics,
and where it asks for that a matrix over its experts found from all their outputs; it gives the
experts that stay, who joins them, and with which weights. Routers that work on groups of experts
merge within each, and keep the same number in each.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from moe_lab.methods.ratios import budget
from moe_lab.profile.all_experts import AllExperts
from moe_lab.profile.layer import LayerStatistics
from moe_lab.types import AlignName, LayerInfo, RouterName

NO_GROUPINGS = {"alignment", "base"}  # the files of this package that are none


@dataclass(frozen=True)
class MergeCandidates:
    """The experts of one layer of which `number` are to stay.

    outputs_EE: what the grouping's `outputs` found, None where it has none. linkage, group_size:
    the method's options.
    """

    statistics: LayerStatistics
    number: int
    outputs_EE: Tensor | None = None
    linkage: str = "average"
    group_size: int = 16


@dataclass(frozen=True)
class Groups:
    """kept[i] becomes the average of the experts groups[i] (itself first) with weights[i]."""

    kept: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Grouping:
    """A way to group experts, and how its paper goes on from there.

    choose(candidates): the groups. scores(statistics): the experts' importance [E], by which a
    ratio says how many stay. align, router, propagate: the paper's, where the method's options
    leave them open. outputs(experts): what `choose` needs to know of all experts' outputs, a matrix
    [E, E]. check(info, number, candidates' options): refuses what is impossible. options: those
    of the method's options that it takes.
    """

    choose: Callable[[MergeCandidates], Groups]
    scores: Callable[[LayerStatistics], Tensor]
    align: AlignName
    router: RouterName
    propagate: bool = False
    outputs: Callable[[AllExperts], Tensor] | None = None
    check: Callable[[LayerInfo, int, Mapping[str, Any]], None] = field(default=lambda *_: None)
    options: tuple[str, ...] = ()


def grouping_names() -> list[str]:
    """The groupings there are."""
    package = importlib.import_module(__package__)
    names = {module.name for module in pkgutil.iter_modules(package.__path__)}
    return sorted(names - NO_GROUPINGS)


def grouping_named(name: str) -> Grouping:
    """The grouping of method.grouping=<name>, one of `grouping_names`."""
    grouping: Grouping = importlib.import_module(f"{__package__}.{name}").GROUPING
    return grouping


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
