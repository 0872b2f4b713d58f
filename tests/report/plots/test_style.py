"""Looks that can be told apart, and colours that say when there is no value."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure

from moe_lab.report.plots import style


def test_looks_differ() -> None:
    looks = [style.look(number) for number in range(56)]
    assert len({(look["color"], look["marker"]) for look in looks}) == 56
    assert style.legend_rows(["a"] * 3, 5.0) == (3, 1)
    columns, rows = style.legend_rows(["a long name of a method"] * 24, 4.4)
    assert columns * rows >= 24 and columns < 4


def test_limits_are_of_what_is_finite_and_never_the_same() -> None:
    values = np.array([np.nan, -2.0, np.inf, 5.0])
    assert style.limits_of(values) == (-2.0, 5.0)
    assert style.limits_of(np.full(3, 4.0)) == (3.5, 4.5)
    assert style.limits_of(np.full(3, 4.0), logarithmic=True) == (2.0, 8.0)
    assert style.limits_of(values[:1]) == (0.0, 1.0)
    assert style.limits_of(values[:1], logarithmic=True) == (0.1, 1.0)


@pytest.mark.parametrize("colours", [style.AMOUNT, style.SIGNED])
def test_no_value_has_a_grey_of_its_own(colours: str) -> None:
    axes = Figure().add_subplot()
    values = np.linspace(0, 1, 100)[None].repeat(2, axis=0)
    values[1] = np.nan
    style.heat(axes, values, (0, 1), colours, False, "auto")
    pixels = np.asarray(axes.images[0].get_array())
    known, unknown = ({tuple(pixel) for pixel in row} for row in (pixels[0], pixels[-1]))
    [grey] = unknown
    assert len(set(grey)) == 1 and len(known) > 90
    assert not any(len(set(map(int, one))) == 1 and abs(int(one[0]) - int(grey[0])) < 8
                   for one in known)  # fmt: skip
