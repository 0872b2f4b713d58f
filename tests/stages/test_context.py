"""Where stages work is no part of what their results are."""

from __future__ import annotations

from collections.abc import Callable

from running import Outcome


def test_device_and_batch_size_enter_no_key(job: Callable[..., Outcome]) -> None:
    assert job("compute.batch_size=3").code == 0
    report = job("compute.batch_size=8", "compute.threads=null").report
    assert all(report[f"cached/{stage}"] for stage in ("profile", "plan", "compress"))
