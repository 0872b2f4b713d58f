"""A store in which nothing is made."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_lab.stages.looking import Looking, NotThere
from moe_lab.store import Store


def test_it_gives_what_is_there_and_makes_nothing(tmp_path: Path) -> None:
    made = Store(tmp_path).get("plan", {"a": 1}, lambda folder: None)
    looking = Looking(tmp_path)
    found = looking.get("plan", {"a": 1}, pytest.fail)
    assert (found.key, found.cached) == (made.key, True)
    with pytest.raises(NotThere):
        looking.get("plan", {"a": 2}, pytest.fail, together=True)
    assert len(list((tmp_path / "plan").glob("*/artifact.json"))) == 1
