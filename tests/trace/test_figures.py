"""A trace's figures against slow loops over its rows."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import tiny_model
from traced import traced

from moe_lab.trace.figures import trace_figures


def test_figures_equal_those_of_a_slow_loop(tmp_path: Path) -> None:
    trace = traced(tiny_model("qwen2_moe"), tmp_path)
    rows = {(r["pass"], r["position"], r["layer"]): r for r in trace.table.to_pylist()}
    figures = trace_figures(trace)
    assert figures["tokens"] == len(rows) / 3 == 23
    for distance in (1, 2):
        first, share = [], []
        for (one, position, layer), row in rows.items():
            if (later := rows.get((one, position, layer + distance))) is not None:
                asked, actual = row[f"ahead_{distance}"], later["experts"]
                first.append(asked[0] == actual[0])
                share.append(len(set(asked) & set(actual)) / 3)
        assert figures[f"ahead_{distance}_top_1"] == pytest.approx(sum(first) / len(first))
        assert figures[f"ahead_{distance}_top_k"] == pytest.approx(sum(share) / len(share))
        assert 0 < sum(share) < len(share)
    used = [
        {(r["layer"], e) for r in rows.values() if r["request"] == one for e in r["experts"]}
        for one in range(3)
    ]
    assert figures["distinct_experts"] == pytest.approx(sum(map(len, used)) / 3 / 24)


def test_nothing_is_told_of_what_was_not_predicted(tmp_path: Path) -> None:
    trace = traced(tiny_model("mixtral"), tmp_path, lookahead=0)
    assert set(trace_figures(trace)) == {"tokens", "distinct_experts"}
