"""Gates as means over all tokens."""

from __future__ import annotations

from condensing import planned


def test_gates_over_all_tokens(measured) -> None:
    _, _, found = measured
    plan, _ = planned(measured, gates="mean_all", layers=[2], experts=[4, 1])
    layer = next(layer for layer in found if layer.info.index == 2)
    expected = [float(layer["gate_sum"][e] / layer["tokens"]) for e in (4, 1)]
    assert list(plan.edited()[0].gates) == expected
    selected, _ = planned(measured, layers=[2], experts=[4, 1])
    assert all(a < b for a, b in zip(expected, selected.edited()[0].gates, strict=True))
