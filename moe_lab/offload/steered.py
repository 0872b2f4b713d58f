"""Policies that fetch ahead, or in two precisions: caches and a link, visit by visit.

When a layer comes, its missing experts are fetched first; then it computes, and while it does the
link is free for what the policy wants next. A transfer that began is finished; what waits gives way
to what is needed, and is asked for anew. There is one cache for all layers, or one for each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from moe_lab.offload.accesses import Accesses
from moe_lab.offload.memory import Device, Memory
from moe_lab.offload.policies.base import Policy
from moe_lab.offload.replay import HIT, LATE, LOW_HIT, LOW_MISS, MISS, SKIPPED, Replayed
from moe_lab.types import UserError

HIGH, LOW, OMITTED = range(3)  # precisions in which an expert is fetched; none: it is left out
Wanted = Iterable[tuple[int, int]]  # experts and the precision, the most urgent first


@dataclass(frozen=True)
class Visit:
    """One MoE layer of one pass: its number, layer, sequence, and accesses [A of the visit]."""

    number: int
    layer: int
    sequence: int
    keys: np.ndarray
    counts: np.ndarray
    unimportance: np.ndarray


class Guide:
    """What steers the caches: one for each replay, which it watches from its first visit on."""

    def __init__(self, accesses: Accesses):
        self.accesses = accesses

    def see(self, visit: Visit) -> None:
        """A layer's router has chosen: what is known from here on."""

    def precisions(self, visit: Visit) -> list[int]:
        """In which precision each expert of the visit is fetched where it is missing."""
        return [HIGH] * len(visit.keys)

    def wanted(self, visit: Visit, pools: Pools) -> Wanted:
        """What is fetched ahead while this layer computes."""
        return ()

    def pinned(self) -> set[int]:
        """Experts that go only where nothing else can."""
        return set()

    def evicted(self, key: int) -> None:
        """An expert has left a cache."""

    def priorities(self, visit: Visit, keys: np.ndarray) -> np.ndarray:
        """How much each of these experts is worth keeping: the least goes first."""
        raise NotImplementedError


@dataclass
class Pool:
    """Slots for experts of one precision; of each layer its own where there are several rooms."""

    slots: int
    rooms: list[set[int]]
    bytes_K: np.ndarray
    arrival: dict[int, float] = field(default_factory=dict)  # of those that are in it

    def __contains__(self, key: int) -> bool:
        return key in self.arrival

    def __len__(self) -> int:
        return len(self.arrival)


@dataclass
class Pools:
    """The caches of a device, by precision, and which room an expert has its place in."""

    pools: tuple[Pool, ...]
    room_K: np.ndarray

    def there(self, key: int) -> bool:
        """Whether an expert is in a cache, or on its way, in some precision."""
        return any(key in pool for pool in self.pools)


class Steered(Policy):
    """The base of policies that fetch ahead, or in two precisions."""

    def guide(self, accesses: Accesses) -> Guide:
        """What steers this replay."""
        raise NotImplementedError

    def pools(self, memory: Memory, accesses: Accesses) -> Pools:
        """The caches: here one precision."""
        return Pools((pool_of(memory, accesses, memory.slots, memory.bytes_K),),
                     _rooms_of(memory, accesses))  # fmt: skip

    def check(self, accesses: Accesses, memory: Memory) -> None:
        """Refuse a cache of which a precision would have too little."""
        self.pools(memory, accesses)

    def replay(self, accesses: Accesses, memory: Memory, machine: Device) -> Replayed:
        """What becomes of each access, with the link and the layers' computing side by side."""
        one = Simulation(
            accesses, memory, machine, self.guide(accesses), self.pools(memory, accesses)
        )
        return one.run()


def pool_of(memory: Memory, accesses: Accesses, slots: int, bytes_K: np.ndarray) -> Pool:
    """A pool with so many slots in all; UserError where one layer's experts do not fit."""
    number = accesses.num_layers if memory.per_layer else 1
    most = max(layer.top_k for layer in accesses.header.layers)
    if slots // number < most:
        raise UserError(
            f"{slots} slots of one precision, and a token needs {most * number} at once (top-k): "
            "ask for more memory, or for another share of the precisions (low_share)"
        )
    return Pool(slots // number, [set() for _ in range(number)], bytes_K)


def _rooms_of(memory: Memory, accesses: Accesses) -> np.ndarray:
    return accesses.layer_K if memory.per_layer else np.zeros_like(accesses.layer_K)


class Simulation:
    """One replay: the clock, the link, the caches, and what is noted of each access."""

    def __init__(
        self, accesses: Accesses, memory: Memory, machine: Device, guide: Guide, pools: Pools
    ):
        self.accesses, self.memory, self.machine = accesses, memory, machine
        self.guide, self.pools = guide, pools
        self.now = self.link_free = 0.0
        self.outcome_A = np.zeros(len(accesses.key_A), np.int8)
        self.moved_V = np.zeros(len(accesses.layer_V))
        self.seconds_V = np.zeros(len(accesses.layer_V))
        self.most = 0

    def run(self) -> Replayed:
        """All visits in order."""
        compute_V = self.machine.compute(self.accesses.tokens_V)
        for number in range(len(self.accesses.layer_V)):
            began, visit = self.now, self._visit(number)
            self.guide.see(visit)
            self._serve(visit)
            self._fetch_ahead(visit, self.now + compute_V[number])
            self.now += compute_V[number]
            self.seconds_V[number] = self.now - began
            self.most = max(self.most, sum(map(len, self.pools.pools)))
        return Replayed(self.accesses, self.outcome_A, self.moved_V, self.seconds_V, self.most)

    def _visit(self, number: int) -> Visit:
        all_, inside = self.accesses, slice(*self.accesses.start_V[number : number + 2])
        return Visit(
            number, int(all_.layer_V[number]), int(all_.sequence_V[number]), all_.key_A[inside],
            all_.count_A[inside], all_.unimportance_A[inside],
        )  # fmt: skip

    def _serve(self, visit: Visit) -> None:
        """Note what is there, then fetch what is not."""
        first = int(self.accesses.start_V[visit.number])
        keys, missing = visit.keys.tolist(), []
        precisions = self.guide.precisions(visit)
        needed = self._needed(keys, precisions)
        together = self.memory.atomic and all(
            len(mine) <= pool.slots for mine, pool in zip(needed, self.pools.pools, strict=True)
        )
        for place, (key, precision) in enumerate(zip(keys, precisions, strict=True)):
            outcome = self._looked_up(key, precision)
            if outcome in (MISS, LOW_MISS):
                missing.append((key, precision))
                if not together:
                    self._fetch(key, precision, visit, {key})
            self.outcome_A[first + place] = outcome
        if together:
            for key, precision in missing:
                self._fetch(key, precision, visit, needed[precision])

    def _needed(self, keys: Sequence[int], precisions: Sequence[int]) -> list[set[int]]:
        """What a visit computes with of each pool: a high copy that is there, whatever is due."""
        high = self.pools.pools[HIGH]
        needed: list[set[int]] = [set() for _ in self.pools.pools]
        for key, precision in zip(keys, precisions, strict=True):
            if key in high or precision == HIGH:
                needed[HIGH].add(key)
            elif precision == LOW:
                needed[LOW].add(key)
        return needed

    def _looked_up(self, key: int, precision: int) -> int:
        """What becomes of an access before anything is fetched; waits for what is on its way."""
        high = self.pools.pools[HIGH]
        if key in high:
            return self._waited(high.arrival[key], HIT)
        if precision == OMITTED:
            return SKIPPED
        if precision == LOW:
            low = self.pools.pools[LOW]
            return self._waited(low.arrival[key], LOW_HIT) if key in low else LOW_MISS
        return MISS

    def _waited(self, arrival: float, outcome: int) -> int:
        if arrival <= self.now:
            return outcome
        self.now = arrival
        return LATE

    def _fetch(self, key: int, precision: int, visit: Visit, needed: set[int]) -> None:
        """Fetch what a layer waits for."""
        pool = self.pools.pools[precision]
        self._make_room(pool, key, visit, needed, forced=True)
        begin = max(self.now, self.link_free)
        self.now = self._moved(pool, key, begin, visit)

    def _fetch_ahead(self, visit: Visit, until: float) -> None:
        """Use the link while the layer computes."""
        needed = set(visit.keys.tolist())
        for key, precision in self.guide.wanted(visit, self.pools):
            begin = max(self.now, self.link_free)
            if begin >= until:
                return
            pool = self.pools.pools[precision]
            if key in pool or key in self.pools.pools[HIGH]:
                continue
            if self._make_room(pool, key, visit, needed, forced=False):
                self._moved(pool, key, begin, visit)

    def _moved(self, pool: Pool, key: int, begin: float, visit: Visit) -> float:
        size = int(pool.bytes_K[key])
        self.link_free = begin + size / self.machine.bandwidth
        pool.arrival[key] = self.link_free
        pool.rooms[self.pools.room_K[key]].add(key)
        self.moved_V[visit.number] += size
        return self.link_free

    def _make_room(
        self, pool: Pool, key: int, visit: Visit, needed: set[int], forced: bool
    ) -> bool:
        """Evict where a room is full, never what is needed.

        What the guide has pinned, and then what is on its way, goes only where it is forced and
        nothing else can.
        """
        room = pool.rooms[self.pools.room_K[key]]
        if len(room) < pool.slots:
            return True
        free = room - needed
        arrived = {one for one in free if pool.arrival[one] <= self.now}
        others = arrived - self.guide.pinned()
        if not others and forced:
            others = arrived or free
        if not others:
            return False
        keys = np.fromiter(others, np.int64, len(others))
        keys.sort()
        gone = int(keys[np.argmin(self.guide.priorities(visit, keys))])
        room.discard(gone)
        del pool.arrival[gone]
        self.guide.evicted(gone)
        return True
