"""MoE-Infinity's matrices: counted from a trace as its paper says, token by token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from families import tiny_model
from traced import traced

from moe_lab.trace.matrices import iteration_matrices, request_matrices


def test_counts_equal_those_of_a_slow_loop(tmp_path: Path) -> None:
    trace = traced(tiny_model("qwen2_moe"), tmp_path)
    by_request = np.zeros((3, 3, 8), int)
    by_pass = {(request, step): np.zeros((3, 8), int) for request in range(3) for step in range(5)}
    for row in trace.table.to_pylist():
        for expert in row["experts"]:
            by_request[row["request"], row["layer"] - 1, expert] += 1
            by_pass[row["request"], row["step"]][row["layer"] - 1, expert] += 1
    made = request_matrices(trace)
    named, found = iteration_matrices(trace)
    assert (made == by_request).all()
    assert [tuple(one) for one in named.tolist()] == list(by_pass)
    assert all((one == by_pass[tuple(name)]).all() for name, one in zip(named, found, strict=True))
    tokens = np.array([8, 7, 8])  # a prompt, and four behind it
    assert (made.sum(axis=2) == 3 * tokens[:, None]).all(), "top-3 of each token in each layer"
    for request in range(3):
        assert (found[named[:, 0] == request].sum(axis=0) == made[request]).all()
