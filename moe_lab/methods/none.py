"""No compression: the dense model alone, profiled and evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_lab.models.edits.keep import KeepLayer
from moe_lab.models.edits.plan import Plan
from moe_lab.profile.profile import Profile
from moe_lab.types import LayerInfo


@dataclass(frozen=True)
class Nothing:
    """Keep every layer as it is."""

    from_routers = True

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Everything is possible."""

    def plan(self, profile: Profile) -> Plan:
        """Each layer is kept."""
        infos = [layer.info for layer in profile.statistics]
        return Plan(tuple(KeepLayer(info.index, info.name) for info in infos))
