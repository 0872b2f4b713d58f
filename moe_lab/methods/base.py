"""What a method is: from a profile to a plan that says what happens to each layer.

Beside the members of `Method` a method may have `identity(options)`, what of its composed options
the plan depends on (all by default); `example(layers)`, edits of the kind that the plan will have,
by which a recipe and the form of the result are judged before any work; `code()`, the modules and
objects that decide the plan beside itself; `from_routers`, true where the routers' statistics are
enough for it; and `takes_groups`, true where it makes a plan for each group of the calibration set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from moe_lab.models.edits.plan import Plan
from moe_lab.profile.layer import LayerStatistics
from moe_lab.profile.profile import Profile
from moe_lab.types import LayerInfo


class Method(Protocol):
    """A way to compress a model; its options are its fields."""

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse an impossible request before any work, with a UserError."""

    def plan(self, profile: Profile) -> Plan:
        """One edit for each MoE layer."""
        ...


class Metric(Protocol):
    """How important a layer's routed experts are (`metrics/`), for methods that ask.

    One that has `scores(profile)` is asked so, and never called.
    """

    def __call__(self, layer: LayerStatistics, /) -> Tensor:
        """A score [E]; higher stays."""
        ...
