"""Reports of a sweep as one frame."""

from __future__ import annotations

from pathlib import Path

from tabled import write

from moe_lab.report.frame import read_reports


def test_jobs_come_in_their_own_order(tmp_path: Path) -> None:
    for number in (10, 9, 1):
        write(tmp_path, number, condense__num_layers=number, compressed__kl=0.1)
    assert list(read_reports(tmp_path)["condense/num_layers"]) == [1, 9, 10]
