"""What a terminal shows of the log, and how long work takes in words."""

from __future__ import annotations

import logging

import pytest

from moe_lab.progress import duration, progress
from moe_lab.runs import logs


def record(name: str, level: int, text: str) -> logging.LogRecord:
    return logging.LogRecord(name, level, "file.py", 1, text, None, None)


def shown(*records: logging.LogRecord) -> list[str]:
    passed = (logs.Console().filter(one) for one in records)  # a new one each, as for each job
    return [
        (one if isinstance(kept, bool) else kept).getMessage()
        for one, kept in ((one, keep) for one, keep in zip(records, passed, strict=True))
        if kept
    ]


@pytest.fixture(autouse=True)
def nothing_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "already_shown", set())


def test_ours_are_shown_and_of_others_only_warnings() -> None:
    assert shown(
        record("moe_lab.store", logging.INFO, "ours"),
        record("httpx", logging.INFO, "theirs"),
        record("transformers.models", logging.WARNING, "their warning"),
    ) == ["ours", "their warning"]


def test_a_warning_is_shown_once_and_an_error_always() -> None:
    warning, error = (record("moe_lab.x", level, "text") for level in
                      (logging.WARNING, logging.ERROR))  # fmt: skip
    assert shown(warning, warning, error, error) == ["text", "text", "text"]


def test_a_warning_of_pythons_is_its_message() -> None:
    text = "/a/b.py:12: UserWarning: mind the gap\n  warnings.warn('mind the gap')\n"
    assert shown(record("py.warnings", logging.WARNING, text)) == ["warning: mind the gap"]


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
