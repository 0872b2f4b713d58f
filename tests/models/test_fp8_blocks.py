"""FP8 in blocks: the formula, written out, and what transformers makes of it."""

from __future__ import annotations

import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from moe_lab.models.fp8_blocks import Blocks


def some_weights() -> torch.Tensor:
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    weight[:8, 8:16] = 0.0
    return weight


def test_each_block_is_scaled_to_the_largest_number() -> None:
    weight = some_weights()
    found = Blocks.of(weight, 8)
    assert found.values.dtype == torch.float8_e4m3fn and found.scale_inv.shape == (2, 3)
    for row in range(2):
        for column in range(3):
            block = weight[8 * row : 8 * row + 8, 8 * column : 8 * column + 8].float()
            scale = float(block.abs().max()) / 448 or 1.0
            assert float(found.scale_inv[row, column]) == torch.tensor(scale)
            values = (block / found.scale_inv[row, column]).to(torch.float8_e4m3fn)
            part = found.values[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            assert torch.equal(part.float(), values.float())
    assert (found.read()[:8, 8:16] == 0).all()


def test_a_reader_is_transformers() -> None:
    found = Blocks.of(some_weights(), 8)
    for dtype in (torch.bfloat16, torch.float32):
        theirs = Fp8Dequantize(None)._dequantize_one(found.values, found.scale_inv, dtype)
        assert torch.equal(found.read().to(dtype), theirs)
    relative = (found.read() - some_weights().float()).norm() / some_weights().norm()
    assert relative < 0.04
