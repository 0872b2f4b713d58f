"""LFU by sequence: counts begin anew with each request (HOBBIT's LFU, 2411.01433)."""

from __future__ import annotations

from moe_lab.offload.counting import Counted
from moe_lab.offload.demand import Demand, Requests


class LeastUsedInSequence(Demand):
    """Least frequently used, counted as the file says."""

    def hits(self, asked: Requests, slots: int) -> bytearray:
        """1 for each access that is one."""
        return Counted(asked, slots, of_sequence=True, of_residence=False).hits()
