"""LRU: the expert that was not needed for the longest time goes."""

from __future__ import annotations

from collections import OrderedDict

from moe_lab.offload.demand import Demand, Requests


class LeastRecentlyUsed(Demand):
    """Least recently used. What is needed together is touched before anything goes."""

    def hits(self, asked: Requests, slots: int) -> bytearray:
        """1 for each access that is one."""
        cache: OrderedDict[int, None] = OrderedDict()
        keys, touch = asked.keys, cache.move_to_end
        found, begin = bytearray(len(keys)), 0
        for end in asked.ends:
            for place in range(begin, end):
                key = keys[place]
                if key in cache:
                    touch(key)
                    found[place] = 1
                else:
                    cache[key] = None
            while len(cache) > slots:  # what is needed now is the youngest, and stays
                cache.popitem(last=False)
            begin = end
        return found
