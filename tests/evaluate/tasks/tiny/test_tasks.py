"""The tiny tasks: their files and configurations."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from small_suites import NUM_ITEMS

from moe_lab.evaluate.tasks.tiny import items, tasks


def test_every_task_has_a_file_and_a_configuration(written: dict[str, Path]) -> None:
    assert tuple(written) and set(written) == set(tasks.TINY_NAMES)
    folder = written["tiny_prose"].parent
    for name, config in zip(tasks.TINY_NAMES, tasks.configs(folder), strict=True):
        assert config["task"] == name
        assert config["dataset_path"] == "json"
        assert config["dataset_kwargs"]["data_files"]["test"] == str(written[name])


def test_files_depend_on_the_seed_alone(written: dict[str, Path], tmp_path: Path) -> None:
    again = tasks.write_items(tmp_path / "again", NUM_ITEMS, seed=0)
    other = tasks.write_items(tmp_path / "other", NUM_ITEMS, seed=1)
    for name in tasks.TINY_NAMES:
        assert again[name].read_bytes() == written[name].read_bytes()
        assert other[name].read_bytes() != written[name].read_bytes()


def test_impossible_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        tasks.write_items(tmp_path, 0)
    with pytest.raises(ValueError, match="unknown domain 'poetry'"):
        items.multiple_choice("poetry", 1, 0)


def test_importing_is_cheap() -> None:
    ours = "moe_lab.data.standard_library, moe_lab.evaluate.tasks.tiny.tasks"
    code = f"import sys, {ours}; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
