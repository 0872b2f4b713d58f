"""What a diagnosis refuses, before any work."""

from __future__ import annotations

import pytest
from running import Job


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["compute.profile=routers"], "set compute.profile=all"),
        (["diagnose.num_samples=-1"], "diagnose.num_samples=-1: it must be at least 0"),
        (["diagnose.weights=3"], "diagnose.weights=3: it must be true or false"),
    ],
)
def test_refusals_come_before_any_work(job: Job, options: list[str], message: str) -> None:
    refused = job("method=none", "diagnose=full", *options)
    assert refused.code == 2 and message in refused.text and not refused.stages()
