"""Least frequently used: evict the expert that was asked for least, of several the oldest.

Counts grow only, so that a heap with what was true once has a lower bound of what is true now: the
least entry is looked at again before it counts, and hits cost no heap at all.
"""

from __future__ import annotations

import heapq

from moe_lab.offload.demand import Requests


class Counted:
    """A cache by counts.

    of_sequence: counts begin anew with each sequence; of_residence: with each stay in the cache.
    """

    def __init__(self, asked: Requests, slots: int, of_sequence: bool, of_residence: bool):
        self.asked, self.slots = asked, slots
        self.of_sequence, self.of_residence = of_sequence, of_residence
        self.counts, self.last = [0] * asked.num_keys, [0] * asked.num_keys
        self.cached = bytearray(asked.num_keys)
        self.heap: list[int] = []
        self.base = len(asked.keys) + 1

    def hits(self) -> bytearray:
        """1 for each access that is one."""
        keys, counts, last, cached = self.asked.keys, self.counts, self.last, self.cached
        found, begin, size, sequence = bytearray(len(keys)), 0, 0, 0
        for end, now in zip(self.asked.ends, self.asked.sequences, strict=True):
            if self.of_sequence and now != sequence:
                sequence = now
                counts[:] = [0] * len(counts)
                self._refresh()
            missing = []
            for place in range(begin, end):
                key = keys[place]
                last[key] = place + 1
                if cached[key]:
                    found[place] = 1
                    counts[key] += 1
                else:
                    counts[key] = 1 if self.of_residence else counts[key] + 1
                    missing.append(key)
            if missing:
                size = self._fetch(missing, begin, size)
            begin = end
        return found

    def _fetch(self, missing: list[int], begin: int, size: int) -> int:
        """Put experts into the cache in the place of others that are not needed now."""
        aside: list[int] = []
        for key in missing:
            if size == self.slots:
                self._evict(begin, aside)
            else:
                size += 1
            self.cached[key] = 1
        for key in (*missing, *aside):
            heapq.heappush(self.heap, self._entry(key))
        return size

    def _evict(self, begin: int, aside: list[int]) -> None:
        heap, keys = self.heap, self.asked.num_keys
        while True:
            key = heap[0] % keys
            if self.last[key] > begin:  # needed in this group
                aside.append(key)
                heapq.heappop(heap)
            elif (entry := self._entry(key)) != heap[0]:
                heapq.heapreplace(heap, entry)
            else:
                heapq.heappop(heap)
                self.cached[key] = 0
                return

    def _entry(self, key: int) -> int:
        """Count, then age, then the expert, as one number."""
        return (self.counts[key] * self.base + self.last[key]) * self.asked.num_keys + key

    def _refresh(self) -> None:
        self.heap = [self._entry(key) for key, there in enumerate(self.cached) if there]
        heapq.heapify(self.heap)
