"""Bits of experts' weights among the numbers that a budget in bytes decides."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from moe_lab.models.packing import packed_layout
from moe_lab.models.rounding import Scheme
from moe_lab.types import LayerInfo, UserError

UNROUNDED = 16  # stands for weights as the files have them
DTYPE_OF_SIZE = {
    2: torch.bfloat16,
    4: torch.float32,
    8: torch.float64,
}  # by size, which alone counts


@dataclass(frozen=True)
class Bits:
    """The numbers of bits among which is chosen, ascending, and how scales are shared.

    Rounded to nearest, symmetric, on compressed-tensors' grid. UNROUNDED among them: not rounded.
    """

    values: tuple[int, ...] = (UNROUNDED,)
    group_size: int | None = None

    def scheme(self, bits: int) -> Scheme | None:
        """How that many bits are stored; None: as the files have it."""
        return None if bits == UNROUNDED else Scheme(bits, self.group_size)

    def fits(self, info: LayerInfo, width: int, bits: int) -> bool:
        """Whether groups divide the inputs of experts of this width."""
        size = self.group_size
        return bits == UNROUNDED or not size or not (width % size or info.hidden_size % size)

    def expert_bytes(self, info: LayerInfo, width: int, bits: int) -> int:
        """What an expert of this width takes, its router row and biases counted."""
        row = info.expert_bytes - info.expert_width * info.neuron_bytes
        scheme = self.scheme(bits)
        if scheme is None:
            return row + width * info.neuron_bytes
        rows, itemsize = _rows(info), info.neuron_bytes // info.neuron_parameters
        size = info.hidden_size
        biases = info.neuron_bytes - rows * size * itemsize
        up = (rows - 1) * _packed_bytes((width, size), scheme, itemsize)
        return row + width * biases + up + _packed_bytes((size, width), scheme, itemsize)


def _packed_bytes(shape: tuple[int, int], scheme: Scheme, itemsize: int) -> int:
    """Of a matrix in our own form, whose scales take so many bytes each."""
    layout = packed_layout(shape, DTYPE_OF_SIZE[itemsize], scheme, own=True)
    return sum(dtype.itemsize * math.prod(size) for dtype, size in layout.values())


def _rows(info: LayerInfo) -> int:
    """Rows and columns of one hidden unit, each as long as the hidden size."""
    rows = info.neuron_parameters // info.hidden_size
    if rows not in (2, 3):
        raise UserError(
            f"ratio.bits: layer {info.index} of {info.family} has experts that work on another "
            "size than the hidden one, whose bytes in few bits are not known here: ratio.bits=null"
        )
    return rows
