"""What makes a stage fit that does not: options, each tried on the forecast itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from moe_lab.forecast.costs import Costs
from moe_lab.forecast.need import Need
from moe_lab.forecast.stages import needs
from moe_lab.forecast.work import Text, TuningWork, Work

Remedy = tuple[str, Work]
LEFT_OUT = {"diagnose": "diagnose=none", "finetune": "finetune=none", "measure": "measure=none",
            "evaluate": "eval=none", "teacher": "finetune.distillation=0",
            "trace": "trace=none"}  # fmt: skip


def remedy_of(need: Need, work: Work, costs: Costs, fits: Callable[[Need], bool]) -> str | None:
    """The first option with which a stage fits, or that leaves it out; None where there is none."""
    for words, changed in _remedies(need.stage, work):
        again = next((one for one in needs(changed, costs) if one.stage == need.stage), None)
        if again is not None and fits(again):
            return words
    return LEFT_OUT.get(need.stage.partition("_")[0])


def _remedies(stage: str, work: Work) -> Iterator[Remedy]:
    """Options that make a stage smaller, those that cost least first."""
    kind = stage.partition("_")[0]
    layerwise = ""
    if kind == "profile" and not work.profiling.layerwise:
        layerwise = "compute.layerwise=true "
        work = replace(work, profiling=replace(work.profiling, layerwise=True))
        yield "compute.layerwise=true", work
    if kind == "finetune" and work.tuning:
        yield from _of_tuning(work, work.tuning)
    if kind in ("profile", "plan", "diagnose", "evaluate"):
        for size in _smaller(work.profiling.text.batch_size):
            yield f"{layerwise}compute.batch_size={size}", _batched(work, size)
    if kind in ("profile", "plan"):
        bounded = _batched(replace(work, profiling=replace(work.profiling, cache_bytes=0)), 1)
        yield "compute.batch_size=1 compute.cache_gib=0", bounded


def _smaller(size: int) -> Iterator[int]:
    while size > 1:
        size //= 2
        yield size


def _batched(work: Work, size: int) -> Work:
    def with_size(text: Text | None) -> Text | None:
        return text and replace(text, batch_size=size)

    profiling = replace(work.profiling, text=replace(work.profiling.text, batch_size=size))
    asked = work.evaluating
    if asked:
        asked = replace(asked, held_out=with_size(asked.held_out), tasks=with_size(asked.tasks))
    diagnosed = with_size(work.diagnosed)
    return replace(work, profiling=profiling, diagnosed=diagnosed, evaluating=asked)


def _of_tuning(work: Work, tuning: TuningWork) -> Iterator[Remedy]:
    checkpointed = replace(tuning, checkpointing=True)
    recomputing = "finetune.gradient_checkpointing=true"
    yield recomputing, replace(work, tuning=checkpointed)
    for size in _smaller(tuning.text.batch_size):
        text = Text(tuning.text.lengths[-size:], size)
        words = f"finetune.phases.<name>.batch_size={size}"
        yield words, replace(work, tuning=replace(tuning, text=text))
        yield f"{recomputing} {words}", replace(work, tuning=replace(checkpointed, text=text))
