"""LRU, and what the next layers' routers choose of this layer's input is fetched meanwhile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np

from moe_lab.offload.accesses import Accesses
from moe_lab.offload.steered import HIGH, Guide, Pools, Steered, Visit, Wanted
from moe_lab.offload.uses import Uses
from moe_lab.option import Option


@dataclass(frozen=True)
class PrefetchingLRU(Steered):
    """Least recently used, with the predictions that the trace holds (`trace.lookahead`)."""

    lookahead: Annotated[int, Option("for how many layers ahead experts are fetched", least=1)] = 1

    def guide(self, accesses: Accesses) -> Guide:
        """By recency and prediction."""
        return _Predicting(accesses, self.lookahead)


class _Predicting(Guide):
    def __init__(self, accesses: Accesses, lookahead: int):
        super().__init__(accesses)
        self.uses, self.lookahead = Uses(len(accesses.layer_K)), lookahead
        self.held: set[int] = set()

    def see(self, visit: Visit) -> None:
        self.uses.add(visit)

    def wanted(self, visit: Visit, pools: Pools) -> Wanted:
        ahead = self.accesses.ahead[: self.lookahead]
        found = [key for one in ahead for key in one.of(visit.number)[0].tolist()]
        self.held = set(found)
        return [(key, HIGH) for key in found]

    def pinned(self) -> set[int]:
        return self.held

    def priorities(self, visit: Visit, keys: np.ndarray) -> np.ndarray:
        last: np.ndarray = self.uses.last[keys]
        return last
