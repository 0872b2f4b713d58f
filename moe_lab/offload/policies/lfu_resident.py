"""LFU within residence: counts begin anew with each fetch (MoE-Infinity's released code)."""

from __future__ import annotations

from moe_lab.offload.counting import Counted
from moe_lab.offload.demand import Demand, Requests


class LeastUsedInResidence(Demand):
    """Least frequently used, counted as the file says."""

    def hits(self, asked: Requests, slots: int) -> bytearray:
        """1 for each access that is one."""
        return Counted(asked, slots, of_sequence=False, of_residence=True).hits()
