"""Expert pruning: the least important experts of each layer go, with their router rows."""

from __future__ import annotations

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

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse a ratio with which a router cannot work."""
        self.ratio.check(layers)

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
        return Plan(edits, notes={"statistics": "intact model", "experts_without_tokens": unseen})
