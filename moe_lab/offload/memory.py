"""What a device has room for, and what moving and computing take: the inputs of a simulation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_lab.offload.accesses import Accesses
from moe_lab.trace.header import TraceHeader, widest_bytes
from moe_lab.types import UserError

BYTES_OF_GIB = 2**30


@dataclass(frozen=True)
class Device:
    """The cost model: seconds of a visit = compute + what it has to wait for the link.

    bandwidth: of the link, bytes a second; layer_seconds: of computing one MoE layer of one pass
    with all that stands before it, whatever the tokens; token_seconds: for each token of the pass.
    """

    bandwidth: float = 32e9
    layer_seconds: float = 100e-6
    token_seconds: float = 1e-6

    def compute(self, tokens_V: np.ndarray) -> np.ndarray:
        """Seconds of each visit by the tokens of its pass."""
        return self.layer_seconds + self.token_seconds * tokens_V


@dataclass(frozen=True)
class Memory:
    """A cache: slots, each as large as the largest expert that may come into it.

    slots: of all layers together; per_layer: whether each layer has its own, equally many; atomic:
    whether the experts of a visit are needed together, so that none goes before the visit is over.
    bytes_K: what fetching each expert moves; slot_bytes: of a slot.
    """

    slots: int
    bytes_K: np.ndarray
    slot_bytes: int
    per_layer: bool = False
    atomic: bool = True


def memory_of(
    accesses: Accesses,
    slots: int,
    bits: int | None = None,
    expert_bytes: int | None = None,
    per_layer: bool = False,
    atomic: bool = True,
) -> Memory:
    """So many slots, checked; bits: of an expert's weights; expert_bytes: of one."""
    header = accesses.header
    check_slots(header, slots, per_layer)
    sizes = [expert_bytes or layer.bytes_at(bits) for layer in header.layers]
    bytes_K = np.array(sizes, np.int64)[accesses.layer_K]
    return Memory(min(slots, len(bytes_K)), bytes_K, max(sizes), per_layer, atomic)


def slots_in(
    header: TraceHeader, gib: float, bits: int | None, expert_bytes: int | None = None
) -> int:
    """How many experts fit beside the rest of the model; UserError where not even that fits."""
    size = expert_bytes or widest_bytes(header.layers, bits)
    left = gib * BYTES_OF_GIB - header.resident_bytes
    if left < size:
        raise UserError(
            f"--memory {gib:g}: the model without its routed experts takes "
            f"{header.resident_bytes / BYTES_OF_GIB:.4g} GiB, and an expert "
            f"{size / BYTES_OF_GIB:.4g} GiB: no expert fits beside it; ask for more memory"
        )
    return int(left // size)


def check_slots(header: TraceHeader, slots: int, per_layer: bool) -> None:
    """Refuse room for fewer experts than one layer's top-k."""
    most, layers = max(layer.top_k for layer in header.layers), len(header.layers)
    needed = most * layers if per_layer else most
    if slots < needed:
        how = f", with a cache for each of {layers} layers {needed}" if per_layer else ""
        raise UserError(
            f"there is room for {slots} experts, and a token needs {most} of one layer at once "
            f"(top-k){how}: ask for more (--experts, --memory), or for fewer bits (--bits)"
        )
