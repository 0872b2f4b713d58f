"""What a terminal shows of the log."""

from __future__ import annotations

import logging

import pytest

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
