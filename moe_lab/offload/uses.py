"""What guides remember of each expert: when, how often and in which precision it was needed."""

from __future__ import annotations

import numpy as np

from moe_lab.offload.steered import Visit


class Uses:
    """Of each expert: its last use (a counter of accesses), uses, and uses in high precision.

    Counts are of the current sequence, and begin anew with the next.
    """

    def __init__(self, num_keys: int):
        self.now, self.sequence = 0, 0
        self.last = np.zeros(num_keys, np.int64)
        self.count = np.zeros(num_keys, np.int64)
        self.high = np.zeros(num_keys, np.int64)

    def add(self, visit: Visit, high: np.ndarray | None = None) -> None:
        """The experts of a visit are needed; high: those in high precision, None for all."""
        if visit.sequence != self.sequence:
            self.sequence = visit.sequence
            self.count[:] = self.high[:] = 0
        number = len(visit.keys)
        self.last[visit.keys] = self.now + 1 + np.arange(number)
        self.now += number
        self.count[visit.keys] += 1
        self.high[visit.keys if high is None else visit.keys[high]] += 1
