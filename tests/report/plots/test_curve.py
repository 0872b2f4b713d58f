"""Curves of a fine-tuning through its phases."""

from __future__ import annotations

from pathlib import Path

from pictured_runs import save_curve

from moe_lab.report.plots import curve


def test_tokens_of_a_curve_go_on_through_its_phases(tmp_path: Path) -> None:
    save_curve(tmp_path, ("lm", "sft"))
    read = curve.read_curve(tmp_path / "curve.jsonl")
    starts = read[read["loss"].isna()]
    assert starts["tokens"].tolist() == [0, 6000] and read["tokens"].is_monotonic_increasing
