"""What one stage needs."""

from __future__ import annotations

from moe_lab.forecast.need import Need


def test_what_is_not_said_is_nothing() -> None:
    need = Need("plan", 5.0)
    assert (need.kept, need.flops, need.read, need.cached) == (0, 0, 0, None)
    assert need.on_device
