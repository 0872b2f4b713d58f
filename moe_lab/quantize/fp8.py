"""FP8 in blocks, as DeepSeek-V3's checkpoints are stored: 8 bits, and a factor for each block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.fp8_blocks import Blocks, Fp8Form
from moe_lab.models.matrices import WeightMatrices, WeightMatrix
from moe_lab.models.packed_writing import WrittenForm
from moe_lab.option import Option, check_options
from moe_lab.quantize.base import QuantizeJob, Quantizer, Quantizing, WhatOption
from moe_lab.types import UserError

SIZES = (128, 64, 32, 16, 8)


@dataclass(frozen=True)
class Fp8(Quantizer):
    """Each block of a matrix is scaled so that its largest weight is FP8's largest number."""

    block: Annotated[int, Option("outputs and inputs that share a factor", among=SIZES)] = 128
    what: WhatOption = "experts"

    def begin(self, job: QuantizeJob) -> Quantizing:
        """Nothing has to be found out."""
        return _InBlocks(self.block)

    def check(self, matrices: Sequence[WeightMatrix]) -> None:
        """Refuse matrices that blocks do not divide, and tensors of several experts."""
        check_options(self, "quantize")
        for one in matrices:
            if not one.is_own:
                raise UserError(
                    f"quantize=fp8: {one.key} is no matrix of its own in the files, and FP8 files "
                    "have one for each expert; quantize=rtn packs it in moe_lab's own form"
                )
            if any(side % self.block for side in one.shape):
                raise UserError(
                    f"quantize.block={self.block} does not divide {one.key} {list(one.shape)}, and "
                    "transformers reads no other; what divides all matrices: "
                    f"{', '.join(map(str, _that_divide(matrices))) or 'none: quantize=rtn'}"
                )

    def form(self, job: QuantizeJob, quantizing: Any) -> WrittenForm:
        """As DeepSeek-V3's files."""
        chosen = {one.key for one in job.chosen}
        return Fp8Form.of(job.checkpoint.config, job.matrices, chosen, self.block)

    def announced(self, checkpoint: Checkpoint, matrices: WeightMatrices) -> list[str]:
        """The form, and that engines ask for blocks of 128."""
        form = Fp8Form.of(checkpoint.config, matrices, set(), self.block)
        told = [f"quantized, it will be {form.reason}"]
        if self.block != 128:
            told.append("engines' kernels for FP8 ask for quantize.block=128")
        return told


def _that_divide(matrices: Sequence[WeightMatrix]) -> list[int]:
    sides = {side for one in matrices for side in one.shape}
    return [size for size in SIZES if not any(side % size for side in sides)]


class _InBlocks(Quantizing):
    def __init__(self, size: int):
        self.size, self.schemes = size, {}

    def layer(
        self, index: int, matrices: Sequence[WeightMatrix]
    ) -> Iterator[tuple[WeightMatrix, Any]]:
        """Each matrix by itself."""
        for one in matrices:
            yield one, Blocks.of(one.load(), self.size)
