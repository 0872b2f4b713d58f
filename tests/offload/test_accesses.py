"""A trace as accesses: against a slow loop over its rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from families import tiny_model
from traced import PROMPTS, traced

from moe_lab.offload.accesses import accesses_of, unimportance
from moe_lab.trace.matrices import request_matrices


@pytest.mark.parametrize("batch_size", [1, 2])
def test_accesses_equal_those_of_a_slow_loop(batch_size: int, tmp_path: Path) -> None:
    trace = traced(tiny_model("qwen2_moe"), tmp_path, batch_size=batch_size)
    found = accesses_of(trace)
    visits: dict[tuple[int, int], dict[int, list[float]]] = {}
    ahead: dict[tuple[int, int], dict[int, bool]] = {}
    tokens: dict[tuple[int, int], int] = {}
    for row in trace.table.to_pylist():
        visit = row["pass"], row["layer"] - 1
        here, gates = visits.setdefault(visit, {}), row["weights"]
        tokens[visit] = tokens.get(visit, 0) + 1
        for place, expert in enumerate(row["experts"]):
            share = sum(gates[:place]) / sum(gates)
            here.setdefault(visit[1] * 8 + expert, []).append(share)
        for place, expert in enumerate(row["ahead_1"] or ()):
            key = (visit[1] + 1) * 8 + expert
            named = ahead.setdefault(visit, {})
            named[key] = named.get(key, False) or place == 0
    assert len(visits) == len(found.layer_V)
    for number, (visit, here) in enumerate(sorted(visits.items())):
        inside = slice(*found.start_V[number : number + 2])
        assert found.key_A[inside].tolist() == list(here), "as they are first asked for"
        assert found.count_A[inside].tolist() == [len(one) for one in here.values()]
        assert found.unimportance_A[inside] == pytest.approx([min(one) for one in here.values()])
        assert found.layer_V[number] == visit[1] and found.tokens_V[number] == tokens[visit]
        keys, first = found.ahead[0].of(number)
        assert dict(zip(keys.tolist(), first.tolist(), strict=True)) == ahead.get(visit, {})
    assert found.decode_V.tolist() == [number % 15 >= 3 for number in range(len(visits))]
    groups = [[0], [1], [2]] if batch_size == 1 else [[0, 2], [1]]
    assert found.sequence_V.tolist() == np.repeat(range(len(groups)), 15).tolist()
    assert (found.visit_A == np.repeat(np.arange(len(visits)), np.diff(found.start_V))).all()
    counted = np.bincount(found.key_A, found.count_A, 24)
    assert (counted == request_matrices(trace).sum(axis=0).reshape(-1)).all()
    assert found.first_L.tolist() == [0, 8, 16] and len(PROMPTS) == 3


def test_unimportance_is_what_heavier_experts_have() -> None:
    starts, weights = np.array([0, 3, 5]), np.array([3.0, 2.0, 1.0, 0.5, 0.0])
    assert unimportance(starts, weights) == pytest.approx([0, 3 / 6, 5 / 6, 0, 1])
    assert unimportance(np.array([0, 2]), np.zeros(2)).tolist() == [0, 0], "never NaN"
