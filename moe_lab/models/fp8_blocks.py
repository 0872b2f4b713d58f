"""Matrices in FP8 with a factor for each block, as DeepSeek-V3's files have them.

A block of `size` outputs and inputs (128 there) shares s = max|W| / 448, kept in float32 as
`_scale_inv`; numbers are W / s in float8_e4m3fn, and a reader computes q * s in float32, of which
it keeps what its own dtype holds. transformers divides a matrix evenly by its factors, so that
blocks have to divide both sides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_lab.models.matrices import WeightMatrices, WeightMatrix
from moe_lab.models.own_config import is_own_form
from moe_lab.models.packed_form import ALSO_LEFT, left_paths
from moe_lab.models.packing import Layout

KIND = torch.float8_e4m3fn
MOST = torch.finfo(KIND).max
SCALE_INV = "scale_inv"


@dataclass(frozen=True)
class Blocks:
    """A matrix in FP8: values [out, in], scale_inv float32 [out / size, in / size]."""

    values: Tensor
    scale_inv: Tensor

    @classmethod
    def of(cls, weight: Tensor, size: int) -> Blocks:
        """A matrix, rounded; a block of zeros has the factor 1."""
        blocks = _blocks(weight.float(), size)
        scale = blocks.abs().amax(dim=(1, 3)) / MOST
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        values = (blocks / scale[:, None, :, None]).clamp(-MOST, MOST).to(KIND)
        return cls(values.reshape(weight.shape), scale)

    def read(self) -> Tensor:
        """The matrix that a reader makes of it, in float32, before its own dtype."""
        size = self.values.shape[0] // self.scale_inv.shape[0]
        blocks = _blocks(self.values.float(), size) * self.scale_inv[:, None, :, None]
        return blocks.reshape(self.values.shape)


def _blocks(matrix: Tensor, size: int) -> Tensor:
    """[out, in] as [out / size, size, in / size, size]."""
    out, width = matrix.shape
    return matrix.reshape(out // size, size, width // size, size)


@dataclass(frozen=True)
class Fp8Form:
    """How the matrices of one checkpoint are written in FP8: as transformers and vLLM read them.

    size: of a block; left: modules that stay as they are; stock: false where the source is in our
    own form, whose config then says the same.
    """

    size: int
    left: tuple[str, ...]
    stock: bool

    @classmethod
    def of(cls, config: Any, matrices: WeightMatrices, chosen: set[str], size: int) -> Fp8Form:
        """The form in which chosen matrices, by their keys, are in FP8; config: the source's."""
        others = [one for one in matrices.every if one.key not in chosen]
        experts = {one.name.rpartition(".")[0]: None for one in others if one.part == "experts"}
        left = dict.fromkeys((ALSO_LEFT, *matrices.left, *left_paths(others), *experts))
        return cls(size, tuple(left), not is_own_form(vars(config)))

    @property
    def reason(self) -> str:
        """Which form, in words."""
        told = f"in FP8 with a factor for each {self.size} x {self.size}, as DeepSeek-V3's files"
        return told if self.stock else f"{told}, in moe_lab's own form"

    def layout(self, matrix: WeightMatrix) -> Layout:
        """Dtype and shape of each tensor that is written of a matrix, by the end of its name."""
        out, width = matrix.shape
        factors = out // self.size, width // self.size
        return {"": (KIND, (out, width)), SCALE_INV: (torch.float32, factors)}

    def parts(self, matrix: WeightMatrix, blocks: Blocks) -> dict[str, Tensor]:
        """These tensors."""
        return {"": blocks.values, SCALE_INV: blocks.scale_inv}

    def read(self, matrix: WeightMatrix, parts: Mapping[str, Tensor]) -> Tensor:
        """The matrix that readers make of what is written."""
        return Blocks(parts[""], parts[SCALE_INV]).read()

    def meant(self, blocks: Blocks) -> Tensor:
        """The same, of what was to be written."""
        return blocks.read()

    def values(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """What config.json says: the source's family values, and how to read the matrices."""
        return dict(values) | {
            "quantization_config": {
                "quant_method": "fp8",
                "fmt": "e4m3",
                "activation_scheme": "dynamic",
                "weight_block_size": [self.size, self.size],
                "modules_to_not_convert": list(self.left),
            }
        }
