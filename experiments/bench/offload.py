"""How many accesses a second the simulator replays, by policy, on a made-up trace.

    python experiments/bench/offload.py [accesses in thousands]

DeepSeek-MoE's shape: 27 layers of 64 experts, of which a token gets 6, drawn by Zipf's law in an
order of its own for each layer; every second token keeps most of the one before. Caches hold a
quarter and a half of all experts. Times are of the processor.
Claim: a million accesses a second for lru, lfu and min, each at its slowest. What the policies that
fetch ahead reach is told without a limit: they work visit by visit.
"""

from __future__ import annotations

import sys
import time

import numpy as np

from moe_lab.offload.accesses import Accesses, Predicted
from moe_lab.offload.choosing import policy_of
from moe_lab.offload.memory import Device, memory_of
from moe_lab.trace.header import TracedLayer, TraceHeader

LAYERS, EXPERTS, TOP_K, LIMIT = 27, 64, 6, 1e6
FAST, SLOW = ("lru", "lfu", "min"), ("lru_prefetch", "moe_infinity", "hobbit")
SEQUENCE = 128  # tokens


def made_up(number: int) -> Accesses:
    """So many accesses of a model that decodes."""
    rng = np.random.default_rng(0)
    passes = number // (LAYERS * TOP_K)
    popularity = 1 / np.arange(1, EXPERTS + 1)
    noise = rng.gumbel(size=(passes, LAYERS, EXPERTS))
    noise[1::2] = noise[: len(noise[1::2]) * 2 : 2] + 0.3 * noise[1::2]
    order = np.argsort(rng.random((LAYERS, EXPERTS)), axis=1)
    scores = noise + np.log(popularity)[order]
    chosen = np.argsort(-scores, axis=2)[:, :, :TOP_K]
    layer = TracedLayer(0, EXPERTS, TOP_K, True, 3 * 2048 * 1408, 6 * 2048 * 1408)
    header = TraceHeader("bench", "made_up", "bfloat16", (layer,) * LAYERS, 0, "", "", 0,
                    passes // SEQUENCE, SEQUENCE, 1, 1, "atomic")  # fmt: skip
    keys = (chosen + np.arange(LAYERS)[None, :, None] * EXPERTS).reshape(-1)
    visits = passes * LAYERS
    starts = np.arange(visits + 1) * TOP_K
    ahead = np.concatenate([keys[TOP_K:], keys[:TOP_K]])
    shares = np.tile(np.arange(TOP_K) / TOP_K, visits)
    return Accesses(
        header, keys, starts, np.ones(len(keys), np.int64), shares,
        np.tile(np.arange(LAYERS), passes), np.ones(visits, np.int64), np.ones(visits, bool),
        np.repeat(np.arange(passes) // SEQUENCE, LAYERS), np.repeat(np.arange(LAYERS), EXPERTS),
        (Predicted(starts, ahead, np.tile(np.arange(TOP_K) == 0, visits)),),
    )  # fmt: skip


def main(thousands: int) -> None:
    whole, short = made_up(1000 * thousands), made_up(100 * thousands // 2)
    slowest = float("inf")
    for name in (*FAST, *SLOW):
        accesses = whole if name in FAST else short
        for share in (4, 2):
            memory = memory_of(accesses, LAYERS * EXPERTS // share)
            started = time.process_time()
            found = policy_of(name).replay(accesses, memory, Device())
            speed = len(accesses.key_A) / (time.process_time() - started)
            slowest = min(slowest, speed) if name in FAST else slowest
            hits = found.figures()["decode/hit_rate"]
            print(f"{name}, 1/{share} of all experts: {speed:,.0f} accesses a second "
                  f"({100 * hits:.1f} % hits)")  # fmt: skip
    print(f"the slowest of {', '.join(FAST)}: {slowest:,.0f} (at least {LIMIT:,.0f})")
    sys.exit(slowest < LIMIT)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
