"""HOBBIT (2411.01433, by secondary sources; no code was released): precision by unimportance.

What of a token's experts has little of its gates is fetched in few bits, or not at all; two pools
hold high and low precision; experts that the next layers' routers foretell are fetched and kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np

from moe_lab.offload.accesses import Accesses
from moe_lab.offload.memory import Memory
from moe_lab.offload.steered import (
    HIGH,
    LOW,
    OMITTED,
    Guide,
    Pools,
    Steered,
    Visit,
    Wanted,
    pool_of,
)
from moe_lab.offload.uses import Uses
from moe_lab.option import Option
from moe_lab.types import UserError


@dataclass(frozen=True)
class Hobbit(Steered):
    """t1, t2: the paper's for Mixtral. The weights of the priority and the share of the pools were
    not published: equal weights and a fifth are ours."""

    t1: Annotated[float, Option("high precision up to this unimportance", least=0, most=1)] = 0.6
    t2: Annotated[float, Option("low precision up to this, skipped above", least=0, most=1)] = 0.9
    low_bits: Annotated[int, Option("of the weights of low precision", among=(8, 4, 3, 2))] = 4
    low_share: Annotated[
        float, Option("of the cache that is for low precision", above=0, below=1)
    ] = 0.2
    lookahead: Annotated[int, Option("layers ahead that are looked at", least=0)] = 2
    recency: Annotated[float, Option("weight of the last use (LRU)", least=0)] = 1.0
    frequency: Annotated[float, Option("weight of uses in the sequence (LFU)", least=0)] = 1.0
    high: Annotated[float, Option("weight of uses in high precision (LHU)", least=0)] = 1.0
    nearness: Annotated[
        float, Option("weight of how soon the layer comes again (FLD)", least=0)
    ] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.t1 > self.t2:
            raise UserError(f"hobbit: t1={self.t1:g} is above t2={self.t2:g}, and must not be")

    def guide(self, accesses: Accesses) -> Guide:
        """By unimportance, prediction and the weighted priorities."""
        return HobbitGuide(accesses, self)

    def pools(self, memory: Memory, accesses: Accesses) -> Pools:
        """A share of the bytes for low precision, the rest for high."""
        sizes = [layer.bytes_at(self.low_bits) for layer in accesses.header.layers]
        low_K = np.minimum(np.array(sizes)[accesses.layer_K], memory.bytes_K)
        given = max(1, round(self.low_share * memory.slots))
        whole = Steered.pools(self, replace(memory, slots=memory.slots - given), accesses)
        slots = given * memory.slot_bytes // int(low_K.max())
        return Pools((*whole.pools, pool_of(memory, accesses, slots, low_K)), whole.room_K)


def precision_of(unimportance: float, t1: float, t2: float) -> int:
    """High up to t1, low up to t2, none above: the heaviest expert, of unimportance 0, is high."""
    if unimportance <= t1:
        return HIGH
    return LOW if unimportance <= t2 else OMITTED


class HobbitGuide(Guide):
    """Its rules, on what the trace foretells."""

    def __init__(self, accesses: Accesses, how: Hobbit):
        super().__init__(accesses)
        self.how, self.uses = how, Uses(len(accesses.layer_K))
        self.held: set[int] = set()

    def see(self, visit: Visit) -> None:
        """The layer's experts are known, and so is which of them are needed in high precision."""
        self.uses.add(visit, visit.unimportance <= self.how.t1)

    def precisions(self, visit: Visit) -> list[int]:
        """By each expert's unimportance; of several tokens the one that needs it most decides."""
        return [precision_of(one, self.how.t1, self.how.t2) for one in visit.unimportance.tolist()]

    def wanted(self, visit: Visit, pools: Pools) -> Wanted:
        """The missing experts of the first layer ahead that will lack some.

        Those that some token's prediction names first in high precision, the others in low.
        """
        self.held = set()
        for one in self.accesses.ahead[: self.how.lookahead]:
            keys, first = one.of(visit.number)
            self.held |= set(keys.tolist())
            missing = [
                (key, HIGH if heaviest else LOW)
                for key, heaviest in zip(keys.tolist(), first.tolist(), strict=True)
                if not pools.there(key)
            ]
            if missing:
                return missing
        return ()

    def pinned(self) -> set[int]:
        """What the layers ahead are foretold to need."""
        return self.held

    def priorities(self, visit: Visit, keys: np.ndarray) -> np.ndarray:
        """The weighted sum of recency, uses, uses in high precision, and nearness, each to 1."""
        how, uses, layers = self.how, self.uses, self.accesses.num_layers
        away = (self.accesses.layer_K[keys] - visit.layer) % layers
        away = np.where(away == 0, layers, away)
        found: np.ndarray = (
            how.recency * uses.last[keys] / max(1, uses.now)
            + how.frequency * uses.count[keys] / max(1, int(uses.count.max()))
            + how.high * uses.high[keys] / max(1, int(uses.high.max()))
            + how.nearness * (1 - away / layers)
        )
        return found
