"""Expert pruning: the least important experts of each layer go, with their router rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moe_lab.methods import Evidence
from moe_lab.statistics import LayerStatistics
from moe_lab.types import Edit, LayerInfo, Plan


@dataclass(frozen=True)
class Prune:
    """Keep the experts that `metric` scores highest, as many as `ratio` leaves."""

    metric: Callable[[LayerStatistics], Tensor]
    ratio: Any

    takes_groups = True

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse a ratio with which a router cannot work, and what the metric refuses."""
        self.ratio.check(layers)
        if hasattr(self._metric, "check"):
            self._metric.check(layers)

    @property
    def from_routers(self) -> bool:
        """Whether the routers' statistics are enough for the metric."""
        return getattr(self._metric, "from_routers", False)

    @property
    def _metric(self) -> Any:
        """The metric itself, where the config bound some of its arguments."""
        return self.metric.func if isinstance(self.metric, functools.partial) else self.metric

    def identity(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options, with a reference checkpoint's content in the place of its path."""
        fingerprint = getattr(self._metric, "fingerprint", None)
        if fingerprint is None:
            return options
        named = {key: value for key, value in options["metric"].items() if key != "reference"}
        return options | {"metric": named | {"fingerprint": fingerprint}}

    def plan(self, evidence: Evidence) -> Plan:
        """One pruning edit per MoE layer."""
        scores = [(layer.info, self.metric(layer)) for layer in evidence.statistics]
        kept = self.ratio.keep(scores)
        unseen = {
            str(layer.info.index): int((layer["count"] == 0).sum()) for layer in evidence.statistics
        }
        edits = tuple(
            Edit(
                info.index, info.name, "prune", kept=kept[info.index], scores=tuple(score.tolist())
            )
            for info, score in scores
        )
        notes = {"statistics": "intact model", "experts_without_tokens": unseen}
        if hasattr(self.ratio, "notes"):
            notes |= self.ratio.notes(scores)
        return Plan(edits, notes=notes)
