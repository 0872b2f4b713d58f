"""The stage: a trace of each variant, its figures in the report, kept in the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_lab.trace.file import read_trace


def test_each_variant_has_a_trace(job: Any) -> None:
    asked = ("trace=full", "trace.prompts.num_samples=2", "trace.prompts.max_length=8",
             "trace.new_tokens=3", "ratio.ratio=0.25")  # fmt: skip
    done = job(*asked)
    assert done.code == 0, done.text
    for variant, experts in (("dense", 8), ("compressed", 6)):
        trace = read_trace(Path(done.report[f"{variant}/trace/file"]))
        assert [layer.experts for layer in trace.header.layers] == [experts] * 3
        assert done.report[f"{variant}/trace/tokens"] == len(trace) / 3 == 2 * (8 + 2)
        assert 0 < done.report[f"{variant}/trace/ahead_1_top_k"] <= 1
        assert trace.header.model == done.report["fingerprint/model"] or variant != "dense"
    assert done.report["cached/trace_dense"] is False
    again = job(*asked, "trace.new_tokens=3")
    assert again.report["cached/trace_dense"] and again.report["cached/trace_compressed"]
    other = job("method=none", "trace=full", "trace.prompts.max_length=500")
    assert other.code == 2 and "make requests of 532 tokens" in other.text
