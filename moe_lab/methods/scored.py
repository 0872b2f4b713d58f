"""What methods share that keep what a metric scores highest, as much as a ratio says."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from moe_lab.methods.base import Method
from moe_lab.methods.metrics.base import Metric, Score, as_metric
from moe_lab.methods.ratios.budget import Ratio
from moe_lab.option import Option
from moe_lab.profile.collect import super_experts
from moe_lab.profile.layer import LayerStatistics


@dataclass(frozen=True)
class ByScores(Method):
    """A method of one metric and one ratio, which decide together with its own options."""

    metric: Annotated[Metric | Score, Option("what scores the experts")]
    ratio: Annotated[Ratio, Option("how many experts stay in each layer")]

    @functools.cached_property
    def _metric(self) -> Metric:
        return as_metric(self.metric)

    @classmethod
    def groups(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        """Which other config groups decide its result."""
        return ("metric", "ratio")

    def identity(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options, with what the result depends on of the metric's and the ratio's."""
        parts = {"metric": self._metric, "ratio": self.ratio}
        return dict(options) | {name: one.identity(options[name]) for name, one in parts.items()}


def protected_experts(
    protect: str | None, statistics: Sequence[LayerStatistics]
) -> dict[int, tuple[int, ...]]:
    """The experts that stay in any case, by layer index, as method.protect says."""
    if protect == "outliers":
        return super_experts(statistics, include_last=True)
    return super_experts(statistics) if protect else {}
