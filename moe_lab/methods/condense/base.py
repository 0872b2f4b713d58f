"""CD-MoE (2412.00069): which layers become dense, with which experts and which gates.

A condensed layer computes, for every token, w_s * shared(x) + sum_{i in S} w_i * E_i(x): no
router. `gates/` holds the ways to set the constants w_i, `experts/` the ways to choose S, `layers/`
the ways to choose the layers: one file each, with one function `choose`; one's own lies anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moe_lab.lookup import named
from moe_lab.methods.condense.expert_search import OpenLayer
from moe_lab.methods.condense.layer_search import CondensedSets
from moe_lab.methods.least_squares import NormalEquations
from moe_lab.methods.ridge import Ridge
from moe_lab.models.experts import Experts
from moe_lab.profile.layer import LayerStatistics
from moe_lab.types import Choice, UserError

CHOICE_RIDGE = Ridge(1e-2, "mean")  # while units are chosen, whichever columns they get then


def choice_named(kind: str, name: str) -> Callable[..., Any]:
    """The function `choose` of condense.<kind>=<name>, or the one at a dotted path.

    UserError lists what exists.
    """
    or_list = "" if kind == "gates" else ", or an explicit list of numbers"
    choose = named(f"condense.{kind}", name, f"{__package__}.{kind}", "choose", (), or_list)
    if not callable(choose):
        raise UserError(f"condense.{kind}={name!r} is no function that could choose")
    return choose  # type: ignore[no-any-return]  # of what it gives, its callers know


def of_units(choose: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a function of `experts/` that chooses hidden units (`UnitCandidates`), not experts."""
    choose.of_units = True  # type: ignore[attr-defined]  # functions have attributes
    return choose


def chooses_units(name: str | Sequence[int]) -> bool:
    """Whether condense.experts=<name> chooses hidden units of all experts."""
    return isinstance(name, str) and hasattr(choice_named("experts", name), "of_units")


def is_own(name: object) -> bool:
    """Whether a choice lies outside the package, so that nothing is known of it."""
    return isinstance(name, str) and "." in name


def draws(name: object) -> bool:
    """Whether a choice may depend on condense.seed."""
    return name == "random" or is_own(name)


def shared_gate(statistics: LayerStatistics) -> float:
    """The constant in place of a shared expert's sigmoid gate: its mean over all tokens, else 1."""
    if "shared_gate_sum" not in statistics.sums:
        return 1.0
    return float(statistics["shared_gate_sum"] / statistics["tokens"])


def ranked_experts(scores: Iterable[float], number: int) -> Choice:
    """The positions of the highest scores, ties to the lower position."""
    scores = [float(score) for score in scores]
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return Choice(tuple(order[:number]))


@dataclass
class ExpertCandidates:
    """One MoE layer whose experts are to be chosen: what `experts/` may look at.

    gates_E: the constant gates; seed: of what is drawn. `open` gives the layer's activations on
    the calibration set and `experts` its experts module with weights: both cost a pass to there.
    """

    statistics: LayerStatistics
    gates_E: Tensor
    seed: int
    open: Callable[[], OpenLayer]
    experts: Callable[[], AbstractContextManager[Experts]]

    @property
    def num_experts(self) -> int:
        """How many routed experts the layer has."""
        return self.statistics.info.num_experts


@dataclass
class UnitCandidates:
    """One MoE layer of whose hidden units some are to be chosen: what `experts/` may look at then.

    units_N2: the candidates (expert or -1 for the shared ones, unit); equations: of all of them
    together, on all documents; columns_ND: theirs with the constant gates. width:
    how many are to be chosen; num_routed: as many routed experts have so many, with the shared.
    A function marked `of_units` gives their places among the candidates [width].
    """

    units_N2: Tensor
    equations: NormalEquations
    columns_ND: Tensor
    width: int
    num_routed: int


@dataclass
class LayerCandidates:
    """The MoE layers to choose from: what `layers/` may look at.

    statistics: by true index, in order; beam and seed: options. `condensed` gives the model with
    any set of them condensed, for which the experts of every layer are chosen first. `refitted`
    gives the same as it will be, refits and all, on documents on which nothing was fitted.
    """

    statistics: dict[int, LayerStatistics]
    condensed: Callable[[], CondensedSets]
    refitted: Callable[[], CondensedSets]
    beam: int
    seed: int

    @property
    def indices(self) -> list[int]:
        """True indices of the MoE layers, in order."""
        return list(self.statistics)


def ranked_layers(indices: Sequence[int], harm: Sequence[float], num_layers: int) -> Choice:
    """The layers with the lowest harm, ties to the lower layer."""
    order = sorted(zip(harm, indices, strict=True))[:num_layers]
    return Choice(tuple(i for _, i in order), tuple(value for value, _ in order))
