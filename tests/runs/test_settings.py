"""What a report says of what was asked for."""

from __future__ import annotations

from collections.abc import Callable

from running import Outcome


def test_jobs_of_a_sweep_can_be_told_apart(job: Callable[..., Outcome]) -> None:
    """What a sweep is over stands in each report, also of a job that is refused."""
    wrong = ["calibration.group_by=domain", "calibration.group=code", "calibration.pack=true"]
    report = job("ratio=coverage", "ratio.coverage=0.8", "ratio.floor=4", *wrong).report
    assert report["status"] == "failed" and report["ratio_method"] == "coverage"
    assert (report["ratio/coverage"], report["ratio/floor"]) == (0.8, 4)
    assert (report["calibration/group_by"], report["calibration/group"]) == ("domain", "code")
