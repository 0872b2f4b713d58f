"""As few experts as cover a share of the score."""

from __future__ import annotations

import pytest
from layer_scores import keep, notes, rows

from moe_lab.methods.ratios.coverage import Coverage
from moe_lab.types import UserError


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


def test_a_share_for_which_all_are_needed_is_refused_with_one_for_which_they_are_not() -> None:
    scores = rows([5.0, 1, 3, 1], [1.0, 1, 1, 1])
    with pytest.raises(UserError, match=r"0\.95 removes nothing.*ratio\.coverage=0\.9 would"):
        keep(Coverage(0.95), scores)
    assert keep(Coverage(0.9), scores) == {1: (0, 1, 2), 2: (0, 1, 2, 3)}
    assert keep(Coverage(1.0), scores) == {1: (0, 1, 2, 3), 2: (0, 1, 2, 3)}, "all were asked for"
    with pytest.raises(UserError, match="Their routers need them"):
        keep(Coverage(0.95, floor=4), scores)
