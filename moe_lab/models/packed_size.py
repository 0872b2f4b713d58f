"""Bytes of a matrix in few bits, as it is packed."""

from __future__ import annotations

from moe_lab.models.rounding import Scheme

WORD = 4  # bytes of an int32, into which levels are packed
SHAPE_BYTES = 16  # two int64 beside each matrix


def packed_bytes(outputs: int, inputs: int, scheme: Scheme, itemsize: int) -> int:
    """Of a matrix [outputs, inputs]: levels, scales of so many bytes each, zero points, shape."""
    groups = scheme.num_groups(inputs)
    words = outputs * _words(inputs * scheme.bits)
    zeros = 0 if scheme.symmetric else groups * _words(outputs * scheme.bits)
    return WORD * (words + zeros) + outputs * groups * itemsize + SHAPE_BYTES


def _words(bits: int) -> int:
    return -(-bits // 32)
