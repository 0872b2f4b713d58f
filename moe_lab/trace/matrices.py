"""MoE-Infinity's expert activation matrices (2401.14361), from a trace.

M[l, e] is the number of tokens that were sent to expert e of layer l: in one forward pass of a
request (iteration-level), or in all of them (request-level).
"""

from __future__ import annotations

import numpy as np

from moe_lab.trace.file import Trace
from moe_lab.trace.recorder import NO_EXPERT


def request_matrices(trace: Trace) -> np.ndarray:
    """Of each request by its number: [requests, L, E], E that of the layer with the most experts.

    As MoE-Infinity's own trace files (.npy) have them.
    """
    return _matrices(trace, trace.numbers("request"), trace.header.requests)


def iteration_matrices(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """Of each forward pass of each request: (request, step) [n, 2] and the matrices [n, L, E]."""
    both = np.stack([trace.numbers("request"), trace.numbers("step")], axis=1)
    named, place = np.unique(both, axis=0, return_inverse=True)
    return named, _matrices(trace, place.reshape(-1), len(named))


def _matrices(trace: Trace, place_R: np.ndarray, number: int) -> np.ndarray:
    """Counts by the place of each row, its layer, and its experts."""
    experts = trace.lists("experts")
    shape = number, len(trace.header.layers), trace.header.num_experts
    rows, values = experts.rows, experts.values
    rows, values = rows[values != NO_EXPERT], values[values != NO_EXPERT]
    flat = np.ravel_multi_index((place_R[rows], trace.layer_place[rows], values), shape)
    return np.bincount(flat, minlength=int(np.prod(shape))).reshape(shape)
