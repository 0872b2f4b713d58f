"""Files of documents, of questions with answers, and of documents with a subject."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from documents import QUESTIONS, ROWS


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": row, "other": row[::-1]}) + "\n" for row in ROWS))
    return path


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return path


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    path = tmp_path / "labelled.jsonl"
    rows = [{"text": row, "subject": "abc"[n % 3], "year": n // 6} for n, row in enumerate(ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
