"""Looks that can be told apart."""

from __future__ import annotations

from moe_lab.report.plots import style


def test_looks_differ() -> None:
    looks = [style.look(number) for number in range(56)]
    assert len({(look["color"], look["marker"]) for look in looks}) == 56
    assert style.legend_rows(["a"] * 3, 5.0) == (3, 1)
    columns, rows = style.legend_rows(["a long name of a method"] * 24, 4.4)
    assert columns * rows >= 24 and columns < 4
