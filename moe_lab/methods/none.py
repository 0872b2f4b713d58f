"""No compression: the dense model alone, profiled and evaluated."""

from __future__ import annotations

from dataclasses import dataclass

from moe_lab.methods.base import Method
from moe_lab.profile.profile import Profile
from moe_lab.types import Edit, Plan


@dataclass(frozen=True)
class Nothing(Method):
    """Keep every layer as it is."""

    from_routers = True

    def plan(self, profile: Profile) -> Plan:
        """Each layer is kept."""
        infos = [layer.info for layer in profile.statistics]
        return Plan(tuple(Edit(info.index, info.name, "keep") for info in infos))
