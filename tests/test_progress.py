"""Progress in lines, and times in words."""

from __future__ import annotations

import logging

import pytest

from moe_lab.progress import duration, progress


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"), (12.34, "12.3 s"), (59.9, "59.9 s"), (59.96, "1 min 0 s"),
        (245, "4 min 5 s"), (3599.6, "1 h 0 min"), (9000, "2 h 30 min"),
    ],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_lines_where_there_is_no_terminal(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line at each tenth, with the time that is left where there is some."""
    clock = iter(range(0, 10_000, 2))
    monkeypatch.setattr("moe_lab.progress.time.monotonic", lambda: float(next(clock)))
    caplog.set_level(logging.INFO)
    assert list(progress(range(20), "work")) == list(range(20))
    lines = [one.getMessage() for one in caplog.records]
    assert len(lines) == 10
    assert lines[0] == "work: 2 of 20, 18.0 s left" and lines[-1] == "work: 20 of 20"
