"""Importance metrics: a score per routed expert [E] from one layer's statistics; higher stays.

Or one per hidden unit of each expert [E, I] (a neuron: `of_neurons`). A metric is a function of
`LayerStatistics`, named as in its paper, with `_partial_: true` in its yaml. One that needs more is
a class derived from `Metric`. One file, one yaml.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from moe_lab.lookup import module_in, names_in, require_kind
from moe_lab.option import Plugin, check_options, declared_by
from moe_lab.profile.layer import LayerStatistics
from moe_lab.profile.profile import Profile
from moe_lab.types import LayerInfo

Score = Callable[..., Tensor]
Marked = TypeVar("Marked", bound=Score)
FROM_ROUTERS: set[Score] = set()  # the functions marked so
NEURON_SCORES: dict[Score, str] = {}  # those that score neurons, with their paper's widths
UNITS = ("experts", "neurons")
WIDTHS = ("by_layer", "by_expert")


class Metric(Plugin):
    """How important a layer's routed experts, or their neurons, are; its options are its fields.

    Either `score` or `scores` has to be there, or of neurons `neuron_score` or `neuron_scores`.
    What else may be:
    score(layer): a score [E] from one layer's statistics; higher stays. Calling the metric is this.
    scores(profile): a score [E] for each layer in order; by default `score` of each.
    neuron_score(layer), neuron_scores(profile): the same of the hidden units of each expert [E, I];
    of the shared experts' [1, I], where `layer` is `LayerStatistics.shared`.
    shared_neuron_scores(profile): a score [I] of those for each layer in order, by default this.
    widths: how the paper ranks neurons, of WIDTHS, unless method.widths says otherwise: those of
    each expert by themselves (by_layer), or those of all experts together (by_expert).
    scores_shared: whether shared experts' hidden units have a score; by default true.
    ranked_neuron_scores(profile, widths): the same where it depends on how they are ranked, of
    WIDTHS; by default neuron_scores.
    refits(profile, kept): new down projections [E, D, W] of what stays ([E, I] bool), by layer
    index; by default none.
    needs_model: whether it looks at the intact model itself, by `scores` alone; by default false.
    check(layers): refuses an impossible request before any work, with a UserError; by default
    values that are out of the range which their `Option` says.
    judges_sets: whether it judges sets of experts, not experts; by default false. Then
    choose(profile, numbers): the set of that size to keep in each layer, by layer index; by default
    None, those with the best scores.
    notes(layers, numbers): facts about the decision for the plan; by default none.
    from_routers: whether the routers' statistics are enough for it; by default false.
    takes_groups: whether a group's statistics are all that it looks at; by default unless
    needs_model.
    identity(options): what of its composed options its scores depend on; by default all.
    """

    needs_model: bool = False
    judges_sets: bool = False
    widths: str = "by_layer"
    scores_shared: bool = True

    @classmethod
    def scored(cls) -> tuple[str, ...]:
        """What it scores, of UNITS: what it has a score of."""
        scores = {"experts": ("score", "scores"), "neurons": ("neuron_score", "neuron_scores")}
        return tuple(
            unit
            for unit, names in scores.items()
            if any(getattr(cls, name) is not getattr(Metric, name) for name in names)
        )

    @property
    def units(self) -> tuple[str, ...]:
        """The same of this one."""
        return self.scored()

    def neuron_score(self, layer: LayerStatistics) -> Tensor:
        """A score [E, I] of the hidden units; higher stays."""
        raise NotImplementedError(f"{type(self).__name__} has no score of neurons")

    def neuron_scores(self, profile: Profile) -> list[Tensor]:
        """A score [E, I] for each layer in order."""
        return [self.neuron_score(layer) for layer in profile.statistics]

    def ranked_neuron_scores(self, profile: Profile, widths: str) -> list[Tensor]:
        """A score [E, I] for each layer in order, of hidden units that are ranked so."""
        return self.neuron_scores(profile)

    def shared_neuron_scores(self, profile: Profile) -> list[Tensor]:
        """A score [I] of the shared experts' hidden units for each layer in order."""
        return [self.neuron_score(layer.shared())[0] for layer in profile.statistics]

    def refits(self, profile: Profile, kept: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """New down projections [E, D, W] of what stays ([E, I] bool), by layer index; none."""
        return {}

    @property
    def title(self) -> str:
        """What messages call it."""
        return f"the metric {type(self).__name__}"

    @property
    def from_routers(self) -> bool:
        """Whether the routers' statistics are enough."""
        return False

    @property
    def takes_groups(self) -> bool:
        """Whether scores from a group's statistics are of that group."""
        return not self.needs_model

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse an impossible request before any work, with a UserError."""
        check_options(self, "metric")

    def score(self, layer: LayerStatistics) -> Tensor:
        """A score [E]; higher stays."""
        raise NotImplementedError(f"{type(self).__name__} has no score of one layer's statistics")

    def __call__(self, layer: LayerStatistics) -> Tensor:
        return self.score(layer)

    def scores(self, profile: Profile) -> list[Tensor]:
        """A score [E] for each layer in order."""
        return [self.score(layer) for layer in profile.statistics]

    def choose(
        self, profile: Profile, numbers: Mapping[int, int]
    ) -> Mapping[int, tuple[int, ...]] | None:
        """The set of that size to keep in each layer, by layer index; None: by the scores."""
        return None

    def notes(self, layers: Sequence[LayerInfo], numbers: Mapping[int, int]) -> dict[str, Any]:
        """Facts about the decision, for the plan."""
        return {}


@dataclass(frozen=True)
class FunctionMetric(Metric):
    """A metric that is a function of one layer's statistics, its other parameters bound."""

    function: Score

    @property
    def units(self) -> tuple[str, ...]:
        """What it scores."""
        return ("neurons",) if _unbound(self.function) in NEURON_SCORES else ("experts",)

    @property
    def widths(self) -> str:  # type: ignore[override]  # of the function, not of the class
        """As the function is marked."""
        return NEURON_SCORES.get(_unbound(self.function), "by_layer")

    def neuron_score(self, layer: LayerStatistics) -> Tensor:
        """What the function gives."""
        return self.function(layer)

    @property
    def title(self) -> str:
        """What messages call it: by its function."""
        return f"the metric {getattr(_unbound(self.function), '__name__', self.function)}"

    @property
    def from_routers(self) -> bool:
        """Whether it is marked so."""
        return _unbound(self.function) in FROM_ROUTERS

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse parameters out of range."""
        bound = self.function.keywords if isinstance(self.function, functools.partial) else {}
        for name, declared in declared_by(_unbound(self.function)).items() if bound else ():
            if name in bound:
                declared.check(f"metric.{name}", bound[name])

    def score(self, layer: LayerStatistics) -> Tensor:
        """What the function gives."""
        return self.function(layer)


def as_metric(given: Metric | Score) -> Metric:
    """A metric, also where a function is given; UserError for anything else."""
    if inspect.isroutine(_unbound(given)):
        return FunctionMetric(given)
    metric: Metric = require_kind("metric", given, Metric)
    return metric


def from_routers(metric: Marked) -> Marked:
    """Mark a function for which the statistics of the routers are enough."""
    FROM_ROUTERS.add(metric)
    return metric


def of_neurons(widths: str = "by_layer") -> Callable[[Marked], Marked]:
    """Mark a function that gives a score [E, I] of the hidden units of each expert.

    widths: how its paper ranks them, of WIDTHS.
    """

    def mark(metric: Marked) -> Marked:
        NEURON_SCORES[metric] = widths
        return metric

    return mark


def names_of_unit(unit: str) -> list[str]:
    """The metrics that score this unit."""
    return [name for name in names_in(__package__) if unit in _units(name)]


def _units(name: str) -> set[str]:
    """What a metric's file scores."""
    units: set[str] = set()
    for member in _members(name):
        if getattr(member, "__module__", None) != f"{__package__}.{name}":
            continue
        if inspect.isclass(member) and issubclass(member, Metric):
            units |= set(member.scored())
        if inspect.isfunction(member) and member.__name__ == name:
            units.add("neurons" if member in NEURON_SCORES else "experts")
    return units


def names_from_routers() -> list[str]:
    """The metrics for which, whatever their options, the routers' statistics are enough."""
    names = names_in(__package__)
    return [name for name in names if any(map(_is_from_routers, _members(name)))]


def _members(name: str) -> list[Any]:
    return list(vars(module_in(__package__, name)).values())


def _is_from_routers(member: Any) -> bool:
    if inspect.isclass(member):
        said: Any = member.from_routers if issubclass(member, Metric) else False
        return said is True  # and no property, which depends on options
    return inspect.isfunction(member) and member in FROM_ROUTERS


def _unbound(given: Metric | Score) -> Metric | Score:
    """Itself, or the function whose parameters a partial binds."""
    return given.func if isinstance(given, functools.partial) else given
