"""A run in numbers, made by hand."""

from __future__ import annotations

from dataclasses import replace

from families import tiny_model

from moe_lab.forecast.costs import Costs
from moe_lab.forecast.shape import shape_of
from moe_lab.forecast.work import (
    EvaluatingWork,
    MeasuringWork,
    ProfilingWork,
    Search,
    Text,
    TuningWork,
    Weights,
    Work,
)

NOTHING = Costs({}, {}, {}, 0.0, 1e9)


def some_work() -> Work:
    """A tiny Qwen2-MoE in two bytes a parameter, of which all is asked."""
    shape = shape_of(tiny_model("qwen2_moe"))
    dense = Weights(shape, 2, 2 * shape.parameters, converted=False)
    text = Text((16,) * 8, 4)
    return Work(
        dense=dense,
        edited=replace(dense, file_bytes=dense.file_bytes // 2),
        profiling=ProfilingWork(text, layerwise=False, cache_bytes=2**20),
        search=Search(),
        tuning=TuningWork(10, 1, text, text, 1000, 1, 4),
        evaluating=EvaluatingWork(text, text),
        measuring=MeasuringWork(1, 16, 2, 1),
    )
