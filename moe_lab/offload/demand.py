"""Policies that fetch an expert only when it is needed: what they share, made for long traces.

A policy here sees numbers of experts and says which accesses are hits; a cache for each layer is as
many caches, each on the accesses of its layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_lab.offload.accesses import Accesses
from moe_lab.offload.memory import Device, Memory
from moe_lab.offload.policies.base import Policy
from moe_lab.offload.replay import HIT, Replayed


@dataclass(frozen=True)
class Requests:
    """The accesses of one cache as plain numbers: what loops in Python are fastest with.

    keys: experts; ends: where each group of accesses that is needed together ends; sequences: the
    number of the sequence that each group belongs to; num_keys: how many experts there are.
    """

    keys: list[int]
    ends: list[int]
    sequences: list[int]
    num_keys: int


class Demand(Policy):
    """The base of policies without prefetching."""

    def hits(self, asked: Requests, slots: int) -> bytearray:
        """1 for each access that a cache with so many slots has, else 0."""
        raise NotImplementedError

    def replay(self, accesses: Accesses, memory: Memory, machine: Device) -> Replayed:
        """All accesses in order, each fetched in full where it is missing."""
        hit_A = np.zeros(len(accesses.key_A), bool)
        most = 0
        for mine_A, slots in caches(accesses, memory):
            asked = requests_of(accesses, mine_A, slots, memory.atomic)
            hit_A[mine_A] = np.frombuffer(self.hits(asked, slots), np.uint8) > 0
            most += min(slots, len(set(asked.keys)))
        visit_A, key_A = accesses.visit_A, accesses.key_A
        moved_V = np.bincount(
            visit_A, np.where(hit_A, 0, memory.bytes_K[key_A]), len(accesses.layer_V)
        )
        seconds_V = machine.compute(accesses.tokens_V) + moved_V / machine.bandwidth
        return Replayed(accesses, hit_A.astype(np.int8) * HIT, moved_V, seconds_V, most)


def caches(accesses: Accesses, memory: Memory) -> list[tuple[np.ndarray, int]]:
    """The accesses of each cache, and its slots: one for all, or one for each layer."""
    if not memory.per_layer:
        return [(np.arange(len(accesses.key_A)), memory.slots)]
    layer_A, number = accesses.layer_K[accesses.key_A], accesses.num_layers
    return [(np.flatnonzero(layer_A == one), memory.slots // number) for one in range(number)]


def requests_of(accesses: Accesses, mine_A: np.ndarray, slots: int, atomic: bool) -> Requests:
    """Some accesses in groups: those of a visit together where access is atomic.

    More than fit, as a long prompt may need of a layer, come one by one.
    """
    visit_A = accesses.visit_A[mine_A]
    number = len(mine_A)
    if atomic and number:
        ends = np.append(np.flatnonzero(np.diff(visit_A)) + 1, number)
        sizes = np.diff(ends, prepend=0)
        if (sizes > slots).any():
            alone = np.flatnonzero(np.repeat(sizes > slots, sizes)) + 1
            ends = np.union1d(ends, alone)
    else:
        ends = np.arange(1, number + 1)
    sequences = accesses.sequence_V[visit_A[ends - 1]] if number else ends
    return Requests(
        accesses.key_A[mine_A].tolist(), ends.tolist(), sequences.tolist(), len(accesses.layer_K)
    )


def next_uses(keys: Sequence[int]) -> np.ndarray:
    """Where each access's expert is asked for next; behind the end, each its own, where never."""
    key_A = np.asarray(keys)
    number = len(key_A)
    order = np.argsort(key_A, kind="stable")
    same = key_A[order][1:] == key_A[order][:-1]
    next_A = number + key_A
    next_A[order[:-1][same]] = order[1:][same]
    return next_A
