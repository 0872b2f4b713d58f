"""What a stage has loaded is gone when it ends, without the garbage collector's help."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from running import Job
from torch import nn

from moe_lab.models import checkpoint, layerwise
from moe_lab.stages.stage import Stage

WHOLE_RUN = (
    "compute.journal_seconds=0", "diagnose=full", "diagnose.num_samples=2", "method=prune",
    "metric=reap", "ratio.ratio=0.25", "finetune=experts", "finetune.distillation=0.5",
    "calibration@finetune.phases.lm.data=files",
    "finetune.phases.lm.data.files=${calibration.files}",
    "finetune.phases.lm.data.num_samples=4", "+finetune.phases.lm.num_steps=1",
    "finetune.phases.lm.validation=null", "quantize=gptq", "quantize.group_size=8",
    "eval=perplexity", "calibration@eval.held_out=files",
    "eval.held_out.files=${calibration.files}", "eval.held_out.num_samples=2", "trace=full",
    "calibration@trace.prompts=files", "trace.prompts.files=${calibration.files}",
    "trace.prompts.num_samples=2", "trace.prompts.max_length=8", "trace.new_tokens=2",
    "measure=speed", "measure.repeats=1", "measure.prompt_length=8", "measure.decode_tokens=1",
)  # fmt: skip
STAGES = "profile diagnose plan compress teach finetune quantize evaluate trace measure".split()
Left = dict[str, Counter[str]]  # of each stage: what is alive, by what loaded it


@pytest.fixture
def left_alive(monkeypatch: pytest.MonkeyPatch) -> Iterator[Left]:
    """What of the models that were loaded was still alive behind each stage."""
    known: list[tuple[str, weakref.ref[Any]]] = []
    left: Left = {}

    def note(loader: str, model: nn.Module) -> None:
        parts = [*model.modules(), *model.parameters(), *model.buffers()]
        known.extend((loader, weakref.ref(part)) for part in parts)

    load, init, run = checkpoint.load, layerwise.LayerwiseModel.__init__, Stage.run

    def noted_load(*args: Any, **kwargs: Any) -> Any:
        model = load(*args, **kwargs)
        note("load", model)
        return model

    def noted_init(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        note("layerwise", self.model)

    def noted_run(self: Stage[Any], job: Any) -> None:
        run(self, job)
        alive = Counter(loader for loader, one in known if one() is not None)
        left[self.make.__module__.rpartition(".")[2]] = alive
        known.clear()  # each is told of once

    monkeypatch.setattr(checkpoint, "load", noted_load)
    monkeypatch.setattr(layerwise.LayerwiseModel, "__init__", noted_init)
    monkeypatch.setattr(Stage, "run", noted_run)
    gc.collect()
    gc.disable()
    yield left
    gc.enable()


def test_no_part_of_a_model_outlives_its_stage(job: Job, left_alive: Left) -> None:
    done = job(*WHOLE_RUN)
    assert done.code == 0, done.text
    assert set(STAGES) <= left_alive.keys()
    assert {stage: alive for stage, alive in left_alive.items() if alive} == {}


def test_none_outlives_a_profile_layer_by_layer(job: Job, left_alive: Left) -> None:
    done = job("compute.layerwise=true")
    assert done.code == 0, done.text
    assert {stage: alive for stage, alive in left_alive.items() if alive} == {}
