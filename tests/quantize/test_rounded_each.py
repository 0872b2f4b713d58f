"""Matrices rounded each by its own scheme, and what a reader makes of them."""

from __future__ import annotations

from pathlib import Path

import torch
from families import tiny_model
from quantised_runs import job_of, tiny_checkpoint

from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.matrices import matrices_of
from moe_lab.models.rounding import Scheme, dequantised, rounded
from moe_lab.quantize.base import QuantizeJob
from moe_lab.quantize.rounded_each import RoundedEach, reading
from moe_lab.quantize.rtn import RoundToNearest


def test_each_has_its_scheme_and_is_read_so(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "source", "gpt_oss")
    job = job_of(checkpoint, RoundToNearest(4, 8), tmp_path / "job")
    schemes = {one.key: Scheme(2 + one.layer, 8) for one in job.chosen}
    for layer in (0, 3):
        these = [one for one in job.chosen if one.layer == layer]
        for matrix, levels in RoundedEach(schemes).layer(layer, these):
            expected = reading(Scheme(2 + layer, 8))(matrix.load())
            assert torch.equal(dequantised(levels), expected)


def test_slices_are_rounded_each_by_itself(tmp_path: Path) -> None:
    tiny_model("gpt_oss").save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    matrices = matrices_of(checkpoint)
    chosen = matrices.chosen("all")
    scheme = Scheme(3, 8, False)
    job = QuantizeJob(checkpoint, matrices, chosen, tmp_path)
    at_work = RoundedEach(job.alike(scheme), clip="mse")
    assert set(at_work.schemes) == {one.key for one in chosen}
    first = [one for one in chosen if one.layer == 0]
    found = dict(at_work.layer(0, first))
    assert list(found) == first
    for matrix, levels in found.items():
        weight = matrix.load()
        slices = weight if weight.dim() == 3 else weight[None]
        for number, one in enumerate(slices):
            alone = rounded(one, scheme, clip="mse")
            ours = levels.levels if weight.dim() == 2 else levels.levels[number]
            assert torch.equal(ours, alone.levels)
