"""MIN (Belady 1966): the expert whose next use is farthest goes. No policy that fetches on demand
has more hits, where all experts are of one size."""

from __future__ import annotations

import heapq

from moe_lab.offload.demand import Demand, Requests, next_uses


class Clairvoyant(Demand):
    """Knows the whole trace: the upper bound, and nothing that could be built."""

    def hits(self, asked: Requests, slots: int) -> bytearray:
        """1 for each access that is one."""
        keys, number = asked.keys, len(asked.keys)
        nexts: list[int] = next_uses(keys).tolist()
        due, cached = [-1] * asked.num_keys, bytearray(asked.num_keys)
        found, heap, begin, size = bytearray(number), list[int](), 0, 0
        push, pop = heapq.heappush, heapq.heappop
        for end in asked.ends:
            missing = []
            for place in range(begin, end):
                key = keys[place]
                due[key] = nexts[place]
                if cached[key]:
                    found[place] = 1
                else:
                    missing.append(key)
            for key in missing:
                while size == slots:
                    # What is due no more at that time, or is needed now, is not the one.
                    farthest = -pop(heap)
                    gone = keys[farthest] if farthest < number else farthest - number
                    if cached[gone] and due[gone] == farthest:
                        cached[gone] = 0
                        size -= 1
                cached[key] = 1
                size += 1
            for place in range(begin, end):
                push(heap, -nexts[place])
            begin = end
            if len(heap) > 4 * slots + 1024:
                heap = [-due[key] for key, there in enumerate(cached) if there]
                heapq.heapify(heap)
        return found
