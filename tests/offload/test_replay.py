"""Figures of a replay, prefill and decoding apart."""

from __future__ import annotations

import numpy as np
from streams import stream

from moe_lab.offload.replay import HIT, LATE, LOW_HIT, LOW_MISS, MISS, SKIPPED, Replayed


def test_figures_are_of_each_phase() -> None:
    accesses = stream([[[0, 1], [0]], [[0, 1], [0]]], 2, 2)
    phases = {"decode_V": np.array([False, False, True, True]), "tokens_V": np.array([3, 3, 1, 1])}
    accesses = type(accesses)(**{**vars(accesses), **phases})
    outcome = np.array([MISS, LOW_MISS, LATE, HIT, SKIPPED, LOW_HIT], np.int8)
    moved, seconds = np.array([30.0, 3, 0, 4]), np.array([1.0, 2, 3, 5])
    told = Replayed(accesses, outcome, moved, seconds, 4).figures()
    assert told["occupancy"] == 4
    for phase, expected in {
        "prefill": dict(tokens=3, accesses=3, hits=0, misses=1, low_misses=1, late=1, hit_rate=0.0,
                        bytes=33.0, bytes_per_token=11.0, seconds=3.0, seconds_per_token=1.0),
        "decode": dict(tokens=1, accesses=3, hits=1, low_hits=1, skipped=1, hit_rate=1.0,
                       bytes=4.0, bytes_per_token=4.0, seconds=8.0, seconds_per_token=8.0),
    }.items():  # fmt: skip
        assert {key: told[f"{phase}/{key}"] for key in expected} == expected
