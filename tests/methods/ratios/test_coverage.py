"""As few experts as cover a share of the score."""

from __future__ import annotations

from layer_scores import keep, notes, rows

from moe_lab.methods.ratios.coverage import Coverage


def test_coverage_keeps_the_fewest_that_reach_it() -> None:
    scores = rows([5.0, 1, 3, 1], [0.0, 10, 0, 0], [0.0, 0, 0, 0])
    assert keep(Coverage(0.8), scores) == {1: (0, 2), 2: (1,), 3: (0,)}
    assert keep(Coverage(0.81), scores)[1] == (0, 1, 2)
    assert keep(Coverage(1.0), scores) == {1: (0, 1, 2, 3), 2: (1,), 3: (0,)}
    assert keep(Coverage(0.1, floor=2), scores) == {1: (0, 2), 2: (0, 1), 3: (0, 1)}
    assert notes(Coverage(0.8), scores) == {
        "kept_per_layer": {"1": 2, "2": 1, "3": 1},
        "covered": {"1": 0.8, "2": 1.0, "3": 1.0},
    }
