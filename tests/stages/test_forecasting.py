"""A run in numbers, from its parts."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate

from moe_lab.models.checkpoint import resolve
from moe_lab.stages.forecasting import (
    Prospect,
    is_downloaded,
    longest_lengths,
    prospect_of,
)
from moe_lab.stages.parts import Parts
from moe_lab.stages.texts import all_sources


def parts_of(composed: Any, *overrides: str) -> Parts:
    return Parts.made(composed(*overrides), functools.partial(instantiate, _convert_="object"))


def asked(composed: Any, checkpoint: Path, *overrides: str) -> Prospect:
    parts, one = parts_of(composed, *overrides), resolve(checkpoint)
    lengths = longest_lengths(parts, 512)
    return prospect_of(one, one.layers(), parts, parts.compute, 2**40, lengths)


def test_text_that_is_not_read_is_as_long_as_it_may_be(composed: Any) -> None:
    parts = parts_of(composed, "eval=perplexity", "calibration.num_samples=3")
    lengths = longest_lengths(parts, 100)
    assert lengths["calibration"] == [100] * 3
    assert set(lengths) == {"calibration", "lm/data", "lm/validation", "held_out"}


def test_what_may_be_downloaded(composed: Any) -> None:
    assert is_downloaded(parts_of(composed, "calibration=c4").calibration)
    assert not any(map(is_downloaded, all_sources(parts_of(composed)).values()))
    mixture = parts_of(composed, "calibration=mixture").calibration
    assert not is_downloaded(mixture)
    hub = parts_of(composed, "calibration=c4").calibration
    assert is_downloaded(replace(mixture, parts=mixture.parts | {"c4": {"source": hub}}))


@pytest.mark.parametrize(
    ("recipe", "first", "share"), [("experts", 1, 0.4), ("seer", 1, 0.1), ("router_kd", 1, 0.0)]
)
def test_what_trains(
    recipe: str, first: int, share: float, composed: Any, checkpoint: Path
) -> None:
    run = asked(composed, checkpoint, "method=prune", "metric=reap", f"finetune={recipe}")
    tuning = run.work.tuning
    assert tuning is not None
    assert tuning.first == first
    assert tuning.trainable > share * run.work.dense.shape.parameters
    assert (tuning.teacher_bytes > 0) == (recipe == "router_kd")


def test_without_edits_there_is_nothing_to_train(composed: Any, checkpoint: Path) -> None:
    run = asked(composed, checkpoint, "method=none")
    assert run.work.tuning is None and run.work.edited is None
    assert run.foreseen.exact


def test_what_is_assumed_is_said(composed: Any, checkpoint: Path) -> None:
    run = asked(composed, checkpoint, "eval=cd_moe", "method=prune", "ratio=global", "metric=reap")
    told = "; ".join(run.assumed)
    assert "8 tasks of lm-eval" in told and "known with the plan" in told


def test_a_large_model_goes_layer_by_layer(composed: Any, checkpoint: Path) -> None:
    parts, one = parts_of(composed), resolve(checkpoint)
    lengths = longest_lengths(parts, 512)
    layers = one.layers()
    size = prospect_of(one, layers, parts, parts.compute, 2**40, lengths).work.dense.bytes
    for memory, expected in ((2 * size + 1, False), (2 * size - 1, True)):
        run = prospect_of(one, layers, parts, parts.compute, memory, lengths)
        assert run.work.profiling.layerwise is expected
