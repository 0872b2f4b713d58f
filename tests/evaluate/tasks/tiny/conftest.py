"""The items of all tiny tasks, written once."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_suites import NUM_ITEMS

from moe_lab.evaluate.tasks.tiny import tasks


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tasks.write_items(tmp_path_factory.mktemp("items"), NUM_ITEMS, seed=0)
