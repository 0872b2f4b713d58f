"""The picture: lines over sizes, bars at one."""

from __future__ import annotations

from pathlib import Path

import pytest
from streams import by_chance

from moe_lab.offload.memory import Device
from moe_lab.offload.pictures import draw_policies
from moe_lab.offload.simulating import Question, simulate


@pytest.mark.parametrize("sizes", [[4, 9], [4]])
def test_it_is_drawn(sizes: list[int], tmp_path: Path) -> None:
    frame = simulate(by_chance(0), Question(["lru", "min"], Device(), sizes))
    draw_policies(frame, tmp_path / "one.png", "A title")
    assert (tmp_path / "one.png").stat().st_size > 10_000
    assert (tmp_path / "one.pdf").is_file()
