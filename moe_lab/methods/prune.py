"""Expert pruning: the least important experts of each layer go, with their router rows."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moe_lab import ratios
from moe_lab.evidence import Evidence
from moe_lab.ratios import Scores
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
        if hasattr(self.ratio, "identity"):
            options = options | {"ratio": self.ratio.identity(options["ratio"])}
        fingerprint = getattr(self._metric, "fingerprint", None)
        if fingerprint is None:
            return options
        named = {key: value for key, value in options["metric"].items() if key != "reference"}
        return options | {"metric": named | {"fingerprint": fingerprint}}

    def plan(self, evidence: Evidence) -> Plan:
        """One pruning edit per MoE layer."""
        scores = self._scores(evidence)
        numbers = self.ratio.numbers(scores, evidence)
        kept = ratios.kept(scores, numbers)
        if hasattr(self._metric, "choose"):
            kept = self._metric.choose(evidence, numbers)
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
            notes |= self.ratio.notes(scores, numbers)
        return Plan(edits, notes=notes)

    def _scores(self, evidence: Evidence) -> Scores:
        layers = evidence.statistics
        if hasattr(self._metric, "scores"):
            found = self._metric.scores(evidence)
        else:
            found = [self.metric(layer) for layer in layers]
        return list(zip((layer.info for layer in layers), found, strict=True))

    def code(self) -> list[Any]:
        """What decides the plan beside this class."""
        parts = [self._metric, self.ratio]
        further = [part.code() for part in parts if hasattr(part, "code")]
        return [self.metric, self.ratio, ratios, *itertools.chain.from_iterable(further)]
