"""The front of a cloud of points."""

from __future__ import annotations

import numpy as np
import pytest

from moe_lab.report.plots import cloud


@pytest.mark.parametrize("x_lower", [True, False])
@pytest.mark.parametrize("y_lower", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_front_is_what_no_other_point_beats(x_lower: bool, y_lower: bool, seed: int) -> None:
    x, y = np.random.default_rng(seed).integers(0, 6, (2, 25)).astype(float)  # with many ties
    found = cloud.front(x, y, x_lower, y_lower)
    for i in range(25):
        beaten = False
        for j in range(25):
            pairs = ((x[i], x[j], x_lower), (y[i], y[j], y_lower))
            as_good = all((b <= a) if lower else (b >= a) for a, b, lower in pairs)
            better = any((b < a) if lower else (b > a) for a, b, lower in pairs)
            beaten |= as_good and better
        assert found[i] == (not beaten)


def test_front_of_few() -> None:
    none = np.array([])
    assert cloud.front(none, none, True, True).tolist() == []
    same = np.array([1.0, 1.0])
    assert cloud.front(same, same, True, False).tolist() == [True, True]
