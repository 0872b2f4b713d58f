"""Every matrix of a job rounded by one scheme, slices of experts one by one."""

from __future__ import annotations

from pathlib import Path

import torch
from families import tiny_model

from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.matrices import matrices_of
from moe_lab.models.rounding import Scheme, rounded
from moe_lab.quantize.base import QuantizeJob
from moe_lab.quantize.rounded_alike import RoundedAlike


def test_slices_are_rounded_each_by_itself(tmp_path: Path) -> None:
    tiny_model("gpt_oss").save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    matrices = matrices_of(checkpoint)
    chosen = matrices.chosen("all")
    scheme = Scheme(3, 8, False)
    at_work = RoundedAlike(QuantizeJob(checkpoint, matrices, chosen, tmp_path), scheme, clip="mse")
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
