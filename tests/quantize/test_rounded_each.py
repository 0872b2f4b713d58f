"""Matrices rounded each by its own scheme, and what a reader makes of them."""

from __future__ import annotations

from pathlib import Path

import torch
from quantised_runs import job_of, tiny_checkpoint

from moe_lab.models.rounding import Scheme, dequantised
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
