"""The stage of measuring: sizes on disk, and their ratio."""

from __future__ import annotations

import json
from pathlib import Path

from closed_form import EXPERTS, tiny

from moe_lab.compute import Compute
from moe_lab.evaluate.decoding.base import as_decoding
from moe_lab.files import FIGURES_FILE
from moe_lab.measure.speed import Measurement, bytes_on_disk
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.stages.context import Context
from moe_lab.stages.measure import Measuring, measure_variants
from moe_lab.store import Store


def test_the_stage_adds_sizes_on_disk_and_their_ratio(tmp_path: Path) -> None:
    variants = {}
    for name, experts in (("dense", EXPERTS), ("compressed", 4)):
        tiny(experts).save_pretrained(tmp_path / name)
        variants[name] = Checkpoint(tmp_path / name)
    how = Measurement(prompt_length=8, decode_tokens=1, repeats=1)
    context = Context(Store(tmp_path / "store"), Compute(device="cpu"))
    made = measure_variants(context, Measuring(variants, how))
    figures = json.loads((made.folder / FIGURES_FILE).read_text())
    for name in variants:
        assert figures[f"{name}/bytes"] == bytes_on_disk(tmp_path / name)
    ratio = bytes_on_disk(tmp_path / "compressed") / bytes_on_disk(tmp_path / "dense")
    assert (figures["dense/bytes_ratio"], figures["compressed/bytes_ratio"]) == (1, ratio)
    assert 0.3 < ratio < figures["compressed/parameter_ratio"] + 0.1


def test_a_decoding_is_timed_beside_greedy(tmp_path: Path) -> None:
    """Its figures are there where it is not greedy, and decide the key."""
    tiny(EXPERTS).save_pretrained(tmp_path / "dense")
    how = Measurement(prompt_length=8, decode_tokens=2, repeats=1)
    variants = {"dense": Checkpoint(tmp_path / "dense")}
    context = Context(Store(tmp_path / "store"), Compute(device="cpu"))
    asked = [Measuring(variants, how), *(
        Measuring(variants, how, as_decoding(name), name) for name in ("scmoe", "dynamic")
    )]  # fmt: skip
    made = [measure_variants(context, one) for one in asked]
    assert len({one.key for one in made}) == 3
    names = {"dense/decoding_seconds_per_token", "dense/decoding_slowdown"}
    for number, one in enumerate(made):
        figures = json.loads((one.folder / FIGURES_FILE).read_text())
        assert names & figures.keys() == (names if number else set())
        assert all(figures[name] > 0 for name in names & figures.keys())
