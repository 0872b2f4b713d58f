"""Methods: from statistics to a plan that says what happens to each layer.

A method has `check(layers)`, which refuses an impossible request before any work, and
`plan(evidence)`. It may have `identity(options)`, what of its composed options the plan depends on
(all by default); `from_routers`, true where the routers' statistics are enough for it; and
`takes_groups`, true where it makes a plan for each group of the calibration set.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moe_lab.statistics import LayerStatistics
from moe_lab.stream import LayerStream


def _always_anew(identity: dict[str, Any], work: Callable[[], Any]) -> Any:
    return work()


@dataclass(frozen=True)
class Evidence:
    """What a method may look at.

    open_stream: the model's decoder layers over the calibration set, made only when a method asks.
    remember: gives what `work` (plain JSON values) gave for the same identity and data before.
    """

    statistics: list[LayerStatistics]
    open_stream: Callable[[], LayerStream]
    remember: Callable[[dict[str, Any], Callable[[], Any]], Any] = _always_anew
