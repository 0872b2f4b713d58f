"""Policies over sizes of the cache: every pair replayed, and told as rows of one table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from moe_lab.offload.accesses import Accesses
from moe_lab.offload.choosing import policy_of
from moe_lab.offload.memory import Device, memory_of, slots_in
from moe_lab.progress import progress
from moe_lab.types import UserError


@dataclass(frozen=True)
class Question:
    """What is asked of a trace.

    policies: as `policy_of` reads them; slots or memory: sizes of the cache in experts, or GiB of
    the device for the whole model. bits, expert_bytes, per_layer: as of `memory_of`; atomic: None
    for what the trace says.
    """

    policies: Sequence[str]
    machine: Device
    slots: Sequence[int] = ()
    memory: Sequence[float] = ()
    bits: int | None = None
    expert_bytes: int | None = None
    per_layer: bool = False
    atomic: bool | None = None


def simulate(accesses: Accesses, asked: Question) -> pd.DataFrame:
    """A row for each policy and size: `policy`, `slots`, `share` of all experts, and figures."""
    header = accesses.header
    policies = {name: policy_of(name) for name in asked.policies}
    sizes: dict[int, float | None] = dict.fromkeys(asked.slots)
    for gib in asked.memory:
        sizes[slots_in(header, gib, asked.bits, asked.expert_bytes)] = gib
    if not sizes or not policies:
        raise UserError("nothing is simulated without a size of the cache (--experts or --memory) "
                        "and a policy (--policy)")  # fmt: skip
    atomic = header.access == "atomic" if asked.atomic is None else asked.atomic
    memories = {
        slots: memory_of(accesses, slots, asked.bits, asked.expert_bytes, asked.per_layer, atomic)
        for slots in sorted(sizes)
    }
    for policy in policies.values():
        for memory in memories.values():
            policy.check(accesses, memory)
    pairs = [(name, slots) for name in policies for slots in memories]
    rows: list[dict[str, Any]] = []
    for name, slots in progress(pairs, "offload"):
        found = policies[name].replay(accesses, memories[slots], asked.machine)
        share = memories[slots].slots / len(accesses.layer_K)
        told = {"policy": name, "slots": memories[slots].slots, "share": share}
        rows.append(told | {"memory_gib": sizes[slots]} | found.figures())
    return pd.DataFrame(rows)
