"""NAEE: the subset of a layer's experts that rebuilds its output best."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from moe_lab.methods.metrics.base import Metric
from moe_lab.option import Option
from moe_lab.profile import all_experts
from moe_lab.profile.all_experts import AllExperts, can_keep
from moe_lab.profile.profile import Profile
from moe_lab.types import LayerInfo

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Naee(Metric):
    """For each layer the experts C with the least ||F(x) - F'(x; C)||_F over a sample.

    NAEE (2402.14800): F is the layer's routed output, F' the same with the experts C alone, as
    pruning leaves them; all C of the size are tried. Where they are more than `max_subsets`, ours
    goes on greedily: of all experts the one is removed without which the error grows least, then
    the next, and so on (backward elimination; ties remove the higher expert). Routers that work on
    groups lose one expert of each group before a second of any.

    As a score, which a ratio over all layers may ask for: the place of an expert in the greedy
    order, 0 for the one removed first; those that the router cannot do without share the highest.

    Every expert is computed on every token of the sample (the paper takes 128 documents of 2048
    tokens).
    """

    num_samples: Annotated[
        int | None, Option("first documents of the calibration set; null: all", least=1)
    ] = 128
    max_subsets: Annotated[
        int, Option("most subsets of which all are tried; 0: never all", least=0)
    ] = 10_000

    needs_model = True
    judges_sets = True

    def scores(self, profile: Profile) -> list[Tensor]:
        """For each layer in order."""
        infos = [layer.info for layer in profile.statistics]
        orders = self._orders(profile, [info.index for info in infos])
        return [_places(info, orders[info.index]) for info in infos]

    def choose(self, profile: Profile, numbers: Mapping[int, int]) -> dict[int, tuple[int, ...]]:
        """The best subset of that size for each layer, in ascending order."""
        infos = {layer.info.index: layer.info for layer in profile.statistics}
        tried = [i for i, n in numbers.items() if self._tries_all(infos[i], n)]
        questions = {i: {"question": "naee", "number": numbers[i]} for i in tried}

        def ask(experts: AllExperts) -> list[int]:
            return _best_subset(experts, numbers[experts.info.index])

        answers = all_experts.answers(profile, self.num_samples, questions, ask, [self])
        orders = self._orders(profile, [index for index in numbers if index not in answers])
        for index, order in orders.items():
            info = infos[index]
            removed = order[: info.num_experts - numbers[index]]
            answers[index] = [expert for expert in range(info.num_experts) if expert not in removed]
        return {index: tuple(answers[index]) for index in numbers}

    def notes(self, layers: Sequence[LayerInfo], numbers: Mapping[int, int]) -> dict[str, Any]:
        """How each layer's subset was found."""
        ways = {}
        for info in layers:
            number = num_subsets(info, numbers[info.index])
            way = "exhaustive, " if self._tries_all(info, numbers[info.index]) else "greedy, of "
            ways[str(info.index)] = f"{way}{number} subsets"
        return {"naee": ways}

    def _tries_all(self, info: LayerInfo, number: int) -> bool:
        return num_subsets(info, number) <= self.max_subsets

    def _orders(self, profile: Profile, indices: Sequence[int]) -> dict[int, list[int]]:
        questions = {index: {"question": "naee_order"} for index in indices}
        return all_experts.answers(profile, self.num_samples, questions, eliminated, [self])


def num_subsets(info: LayerInfo, number: int) -> int:
    """How many sets of `number` experts the layer's router could be left with."""
    subsets: int = math.comb(info.num_experts // info.groups, number // info.groups) ** info.groups
    return subsets


def subsets(info: LayerInfo, number: int) -> Iterator[tuple[int, ...]]:
    """Those sets, each in ascending order: the same number of each group."""
    size = info.num_experts // info.groups
    of_group = [
        itertools.combinations(range(group * size, (group + 1) * size), number // info.groups)
        for group in range(info.groups)
    ]
    return (tuple(itertools.chain(*parts)) for parts in itertools.product(*of_group))


def _best_subset(experts: AllExperts, number: int) -> list[int]:
    """By trying all; ties go to the first in lexicographic order."""
    sets = list(subsets(experts.info, number))
    logger.info("naee: layer %d: trying %d subsets of %d experts",
                experts.info.index, len(sets), number)  # fmt: skip
    errors = experts.errors(sets)
    best = min(range(len(sets)), key=lambda place: errors[place].mse)
    return list(sets[best])


def eliminated(experts: AllExperts) -> list[int]:
    """The experts in the order of backward elimination, as many as the router can do without."""
    info, removed = experts.info, []
    logger.info("naee: layer %d: one expert after another goes, by trying %d subsets",
                info.index, num_eliminations(info))  # fmt: skip
    kept = list(range(info.num_experts))
    size = info.num_experts // info.groups
    while can_keep(info, subset := _one_less(info, kept)) and subset:
        groups = set(range(info.groups))
        while groups:  # one expert of each group, the cheapest first
            candidates = [expert for expert in reversed(kept) if expert // size in groups]
            errors = experts.errors([[e for e in kept if e != gone] for gone in candidates])
            best = min(range(len(candidates)), key=lambda place: errors[place].mse)
            gone = candidates[best]
            kept.remove(gone)
            removed.append(gone)
            groups.remove(gone // size)
    return removed


def num_eliminations(info: LayerInfo) -> int:
    """How many subsets `eliminated` tries."""
    kept, number = list(range(info.num_experts)), 0
    while can_keep(info, subset := _one_less(info, kept)) and subset:
        number += len(kept) // info.groups * (info.groups * (info.groups + 1) // 2)
        kept = subset
    return number


def _one_less(info: LayerInfo, kept: Sequence[int]) -> list[int]:
    """`kept` without the first expert of each group: any set of the next size."""
    size = info.num_experts // info.groups
    first = {next(e for e in kept if e // size == group) for group in range(info.groups)}
    return [expert for expert in kept if expert not in first]


def _places(info: LayerInfo, order: Sequence[int]) -> Tensor:
    score_E = torch.full((info.num_experts,), float(len(order)), dtype=torch.float64)
    for place, expert in enumerate(order):
        score_E[expert] = place
    return score_E
