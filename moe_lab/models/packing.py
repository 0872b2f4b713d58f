"""Matrices of few bits in files: the tensors of one, and the matrix that these are.

Levels are packed as compressed-tensors' "pack-quantized" has them (0.19 and later: densely, so that
3, 5, 6 and 7 bits cross from one word of 32 bits to the next). Behind the name of a matrix stand
`_packed` (int32), `_scale` and `_shape` (int64: out, in), with a zero point `_zero_point` (int32,
packed along the outputs). In our own form comes `_scheme` (int64: bits, and the axis of the file's
tensor along which the inputs run, -1 or -2), so that each tensor says itself how it is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
from torch import Tensor

from moe_lab.models.rounding import Levels, Scheme, dequantised

LEVEL_WORDS, SCALE, SHAPE, ZERO_POINT, SCHEME = "packed", "scale", "shape", "zero_point", "scheme"
PARTS = (LEVEL_WORDS, SCALE, SHAPE, ZERO_POINT, SCHEME)
PACKING_VERSION = "0.20.1"  # of compressed-tensors, whose packing this is
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # of each part


def packed_layout(
    shape: tuple[int, ...], dtype: torch.dtype, scheme: Scheme, own: bool = False
) -> Layout:
    """Dtype and shape of each part of a matrix [..., out, in], before any is there."""
    *front, out, width = shape
    groups = scheme.num_groups(width)
    words = math.ceil(width * scheme.bits / 32)
    found: Layout = {
        LEVEL_WORDS: (torch.int32, (*front, out, words)),
        SCALE: (dtype, (*front, out, groups)),
        SHAPE: (torch.int64, (len(shape),)),
    }
    if not scheme.symmetric:
        found[ZERO_POINT] = torch.int32, (*front, math.ceil(out * scheme.bits / 32), groups)
    if own:
        found[SCHEME] = torch.int64, (2,)
    return found


def packed_bytes(shape: tuple[int, ...], dtype: torch.dtype, scheme: Scheme) -> int:
    """Bytes of a packed matrix [..., out, in]: levels, scales and zero points."""
    layout = packed_layout(shape, dtype, scheme)
    return sum(kind.itemsize * math.prod(size) for kind, size in layout.values())


def packed(levels: Levels, bits: int, own: bool = False, axis: int = -1) -> dict[str, Tensor]:
    """The parts of a matrix; axis: of the file's tensor, along which its inputs run."""
    found = {
        LEVEL_WORDS: pack(levels.levels.contiguous(), bits),
        SCALE: levels.scale.contiguous(),
        SHAPE: torch.tensor(levels.levels.shape),
    }
    if levels.zero_point is not None:
        found[ZERO_POINT] = pack_to_int32(levels.zero_point.contiguous(), bits, packed_dim=0)
    if own:
        found[SCHEME] = torch.tensor([bits, axis])
    return found


def pack(levels: Tensor, bits: int) -> Tensor:
    """Levels int8 [..., out, in] as words of 32 bits, as compressed-tensors packs them.

    Where bytes hold whole levels and words whole bytes, several times faster than it does.
    """
    each = 8 // bits
    if bits not in (2, 4, 8) or levels.shape[-1] % (4 * each):
        words: Tensor = pack_to_int32(levels, bits)
        return words
    values = (levels + 2 ** (bits - 1)).view(torch.uint8)  # 8 bits wrap around, as they should
    found = values[..., ::each].clone()
    for place in range(1, each):
        found |= values[..., place::each] << (bits * place)
    found_words: Tensor = found.view(torch.int32)
    return found_words


def unpacked(parts: Mapping[str, Tensor], bits: int | None = None) -> Tensor:
    """The matrix that parts are, in the shape of the file before; see `rounding.dequantised`.

    bits: where no scheme is among them.
    """
    axis = -1
    if SCHEME in parts:
        bits, axis = parts[SCHEME].tolist()
    assert bits is not None
    shape = torch.Size(parts[SHAPE].tolist())
    levels, zero_point = unpack_from_int32(parts[LEVEL_WORDS], bits, shape), None
    if ZERO_POINT in parts:
        zero_point = _unpacked_zeros(parts[ZERO_POINT], bits, shape[-2])
    read = dequantised(Levels(levels, parts[SCALE], zero_point))
    return read if axis == -1 else read.mT.contiguous()


def _unpacked_zeros(words: Tensor, bits: int, out: int) -> Tensor:
    """Zero points [..., out, groups] from their words, which run along the outputs."""
    # By hand: of a single word compressed-tensors 0.20.1 cannot undo its own packing of 4 bits.
    turned = words.mT.clone(memory_format=torch.contiguous_format)
    found: Tensor = unpack_from_int32(turned, bits, torch.Size((*turned.shape[:-1], out)))
    return found.mT


def scheme_of(parts: Mapping[str, Any]) -> Scheme:
    """The scheme of a packed matrix in our own form; parts: its `stored.Stored`."""
    bits, _ = parts[SCHEME].load().tolist()
    width, groups = int(parts[SHAPE].load()[-1]), parts[SCALE].shape[-1]
    # A single scale for all inputs is told as such, also where a group would be as large.
    return Scheme(bits, None if groups == 1 else width // groups, ZERO_POINT not in parts)


class Unpacked:
    """A matrix that is unpacked when it is read, as a slice of a file; parts: their slices."""

    def __init__(self, parts: Mapping[str, Any], bits: int | None, shape: tuple[int, ...]):
        self.parts, self.bits, self.shape = parts, bits, shape

    def __getitem__(self, index: Any) -> Tensor:
        return unpacked({name: part[...] for name, part in self.parts.items()}, self.bits)[index]

    def get_shape(self) -> list[int]:
        """As of a slice: the file's tensor before it was packed."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """As of a slice: its scales', though what is read is wider, for whatever dtype computes."""
        dtype: str = self.parts[SCALE].get_dtype()
        return dtype


def unpacking(tensors: Mapping[str, Any], bits: int | None = None) -> dict[str, Any]:
    """Tensors or slices of files, the parts of each packed matrix as one that unpacks.

    bits: as the config says; without, those in our own form, which say it themselves.
    """
    found, last = dict(tensors), LEVEL_WORDS if bits else SCHEME
    for key in (key for key in tensors if key.endswith(f"_{last}")):
        whole = key.removesuffix(f"_{last}")
        names = [name for name in PARTS if f"{whole}_{name}" in tensors]
        parts = {name: found.pop(f"{whole}_{name}") for name in names}
        axis = parts[SCHEME][...].tolist()[1] if SCHEME in parts else -1
        *front, out, width = parts[SHAPE][...].tolist()
        unpacks = (*front, out, width) if axis == -1 else (*front, width, out)
        found[whole] = Unpacked(parts, bits, unpacks)
    return found
