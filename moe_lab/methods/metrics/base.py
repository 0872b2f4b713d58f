"""Importance metrics: a score per routed expert [E] from one layer's statistics; higher stays.

A metric is a function of `LayerStatistics`, named as in its paper. One file, one yaml. It may have
`from_routers` (true where the routers' statistics are enough for it), `check(layers)`, and, where
an option is the path of something, `fingerprint`, the content's. One that needs more than sums has
`scores(profile)`, a score [E] for each layer in order, in the place of being called; and one that
judges sets of experts, not experts, may have `choose(profile, numbers)`, the set of that size that
it would keep in each layer, by layer index, and `notes(layers, numbers)`, facts about that for the
plan. `takes_groups` is false where it looks at the model on the whole calibration set, whatever
group the statistics are of. `code()`: the modules that decide beside itself.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

Marked = TypeVar("Marked", bound=Callable[..., Tensor])


def from_routers(metric: Marked) -> Marked:
    """Mark a metric for which the statistics of the routers are enough."""
    metric.from_routers = True  # type: ignore[attr-defined]  # functions can have some
    return metric


def names_from_routers() -> list[str]:
    """The metrics that are so marked."""
    package = importlib.import_module(__package__)
    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    members = {name: vars(importlib.import_module(f"{__package__}.{name}")) for name in names}
    return [
        name
        for name, values in members.items()
        if any(getattr(value, "from_routers", False) is True for value in values.values())
    ]
