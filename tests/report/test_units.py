"""Units: how values are written, and what titles say of them."""

from __future__ import annotations

import pytest

from moe_lab.report import units


@pytest.mark.parametrize(
    ("unit", "value", "text"),
    [
        (units.COUNT, 999_949, "999.9 k"),
        (units.COUNT, 999_950, "1.0 M"),
        (units.COUNT, 950, "950"),
        (units.BYTES, 32_751_456_256, "32.8 GB"),
        (units.BYTES, 999, "999 B"),
        (units.SHARE, 0.7025, "70.2 %"),
        (units.PART, 0.7025, "0.703"),
        (units.TIMES_DENSE, 1.2149, "1.21×"),
        (units.TRUTH, True, "yes"),
        (units.TRUTH, 1 / 3, "33 % yes"),
        (units.SMALL_NUMBER, 6.0, "6"),
        (units.SECONDS, 0.1234, "0.123 s"),
    ],
)
def test_values_in_their_unit(unit: units.Unit, value: float, text: str) -> None:
    assert unit.write(value) == text


def test_titles_say_what_values_do_not() -> None:
    """Above values, on the page's axes, on those of pictures."""
    said = {
        unit.name: (unit.above("a"), unit.on_page("a"), unit.in_picture("a"))
        for unit in (units.NATS, units.TIMES_DENSE, units.BYTES, units.NUMBER)
    }
    assert said == {
        "nats": ("a (nats)", "a, nats", "a (nats)"),
        "times": ("a", "a, times dense", "a (× dense)"),
        "bytes": ("a", "a", "a (% of dense)"),
        "–": ("a", "a", "a"),
    }
    shares = units.SHARE, units.SHARE_OF_DENSE
    assert [unit.in_picture("a") for unit in shares] == ["a (%)", "a (% of dense)"]
    assert [unit.on_page("a") for unit in shares] == ["a", "a, share of dense"]
