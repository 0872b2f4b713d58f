"""No compression: the dense model alone, profiled and evaluated."""

from __future__ import annotations

from dataclasses import dataclass

from moe_lab.methods.base import Method
from moe_lab.models.edits.keep import KeepLayer
from moe_lab.models.edits.plan import Plan
from moe_lab.profile.profile import Profile


@dataclass(frozen=True)
class Nothing(Method):
    """Keep every layer as it is."""

    from_routers = True

    def plan(self, profile: Profile) -> Plan:
        """Each layer is kept."""
        infos = [layer.info for layer in profile.statistics]
        return Plan(tuple(KeepLayer(info.index, info.name) for info in infos))
