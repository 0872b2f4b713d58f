"""The stage: a trace of each variant, its figures in the report, kept in the store."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from families import tiny_model
from transformers import LlamaConfig

from moe_lab.data.embedded import StandardLibrary
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.stages import trace
from moe_lab.trace.file import read_trace
from moe_lab.trace.tracing import Tracing


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


def test_a_variant_without_moe_layers_has_no_trace_and_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_model("mixtral").config.save_pretrained(tmp_path / "dense")
    LlamaConfig(hidden_size=32, num_hidden_layers=1).save_pretrained(tmp_path / "compressed")
    variants = {name: Checkpoint(tmp_path / name) for name in ("dense", "compressed")}
    parts = SimpleNamespace(trace=Tracing(StandardLibrary(num_samples=2, max_length=8)))
    run: Any = SimpleNamespace(parts=parts, texts={"prompts": None}, all_variants=variants)
    with caplog.at_level(logging.WARNING):
        assert list(trace.STAGE.inputs(run)) == ["trace_dense"]
    assert "compressed has no MoE layer" in caplog.text
