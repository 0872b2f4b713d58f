"""Memory that is left: of the machine, and of what a container or a job may have."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from moe_lab.models import free_memory


def limited(folder: Path, limit: str, anonymous: int) -> None:
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.stat").write_text(f"anon {anonymous}\nfile 900\nslab_unreclaimable 5\n")


def test_the_least_of_all_limits_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_memory, "CGROUP", tmp_path)
    available = psutil.virtual_memory().available
    assert free_memory.free_memory("cpu") == pytest.approx(available, rel=0.5), "no group"
    limited(tmp_path, "max", 0)
    assert free_memory.free_memory("cpu") == pytest.approx(available, rel=0.5), "no limit"
    limited(tmp_path, "1000", 300)
    assert free_memory.free_memory("cpu") == 695, "files in memory can go"
    limited(tmp_path, "1000", 1200)
    assert free_memory.free_memory("cpu") == 0
