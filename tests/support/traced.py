"""Traces of tiny models, and a slow look at what a model does with each token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moe_lab.models.layers import moe_layers
from moe_lab.models.observing import observe
from moe_lab.trace.file import Trace, read_trace
from moe_lab.trace.header import TraceHeader
from moe_lab.trace.recorder import traced_layer
from moe_lab.trace.recording import record
from moe_lab.types import Routing

PROMPTS = ((5, 6, 7, 8), (9, 10, 11), (12, 13, 14, 15))


def header(model: Any, requests: int = len(PROMPTS), **changes: Any) -> TraceHeader:
    layers = tuple(map(traced_layer, moe_layers(model)))
    values = dict(
        model="0123456789ab", family=model.config.model_type, dtype="float32", layers=layers,
        resident_bytes=1000, tokenizer="t", data="d", seed=0, requests=requests, new_tokens=5,
        lookahead=2, batch_size=1, access="atomic",
    )  # fmt: skip
    return TraceHeader(**(values | changes))


def traced(
    model: Any, folder: Path, prompts: Sequence[tuple[int, ...]] = PROMPTS, **changes: Any
) -> Trace:
    """The trace of a model that continues the prompts."""
    record(model, prompts, header(model, len(prompts), **changes), folder)
    return read_trace(folder)


def routings(model: Any, ids: Sequence[int]) -> dict[int, Routing]:
    """What each MoE layer does with these tokens in one pass, by its true index."""
    found = {}
    with torch.no_grad(), observe(model, lambda info, one: found.update({info.index: one})):
        model(torch.tensor([list(ids)]), use_cache=False)
    return found
