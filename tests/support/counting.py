"""Samples cut in many ways, and statistics that must not notice."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from families import tiny_model
from torch import Tensor

from moe_lab import processes
from moe_lab.profile.collect import added, collect_statistics, save_statistics
from moe_lab.profile.layer import CONSTANTS, LayerStatistics

OF_ROUTERS = (
    "tokens count gate_sum gate_square_sum probability_sum pair_count logit_product_sum "
    "entropy_sum rank_count rank_share_sum router_norm weight_abs_sum weight_square_sum "
    "weight_count"
).split()


def samples() -> list[list[int]]:
    """Ten of different lengths."""
    generator = random.Random(0)
    return [[generator.randrange(3, 96) for _ in range(2 + 2 * n)] for n in range(10)]


def batches(size: int, left: bool = False) -> list[dict[str, Tensor]]:
    """The samples in batches of `size`, padded on the right or on the left."""
    found = []
    for start in range(0, 10, size):
        rows = samples()[start : start + size]
        length = max(len(row) for row in rows)
        ids = [[0] * (length - len(row)) + row if left else row + [0] * (length - len(row))
               for row in rows]  # fmt: skip
        mask = (torch.tensor(ids) != 0).long()
        found.append({"input_ids": torch.tensor(ids), "attention_mask": mask})
    return found


def assert_alike(found: list[LayerStatistics], others: list[LayerStatistics], rtol: float) -> None:
    """Counts to the bit; soft counts and the other sums of the router to rounding."""
    assert len(found) == len(others) > 0
    for one, other in zip(found, others, strict=True):
        for name in ("tokens", "count", "rank_count", "pair_count", *CONSTANTS):
            assert torch.equal(one[name], other[name]), name
        for name in OF_ROUTERS:
            torch.testing.assert_close(one[name], other[name], rtol=rtol, atol=10 * rtol, msg=name)


def count_half(folder: Path) -> None:
    """In one of two processes: every second batch, then the sums of both."""
    assert processes.number() == 2
    model = tiny_model("deepseek_v3")
    mine = batches(3)[processes.index() :: 2]
    found = added(processes.gather(collect_statistics(model, mine, only_routers=True)))
    target = folder / str(processes.index())
    target.mkdir()
    save_statistics(found, target)
    processes.close()
