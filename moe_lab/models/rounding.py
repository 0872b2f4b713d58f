"""Weights as whole numbers of a few bits and scales: rounding to nearest, and reading that.

A matrix W [out, in] becomes levels q and, for each output and group of inputs, a scale s and, where
asked, a zero point z; a reader computes (q - z) * s. Two grids: `full` is compressed-tensors'
min-max observer's, s = max|W| / ((2^b - 1) / 2) with levels -2^(b-1) to 2^(b-1) - 1, or with a zero
point s = (max W - min W) / (2^b - 1), z = -2^(b-1) - min W / s; `restricted` is MoQE's
(2310.02410), s = max|W| / (2^(b-1) - 1) with levels that are as many below 0 as above.

Scales have the weight's dtype, as they are stored; levels are the nearest for these very scales,
computed in float32. The operations are compressed-tensors' in its order, so that `dequantised`
gives the bits that its readers give. A reader in bfloat16 or float16 multiplies in that dtype, one
in float32 loses nothing of bfloat16 scales: products are float32's, which each rounds to its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

BITS = range(2, 9)
CLIPS = ("none", "mse")
Grid = Literal["full", "restricted"]
Clip = Literal["none", "mse"]
Reads = Callable[[Tensor], Tensor]  # a matrix [..., out, in] to what a reader makes of its levels
# What `clip="mse"` tries of each group's largest weight: 1, 0.98, ..., 0.3.
RANGE_SHARES = tuple(1 - step / 50 for step in range(36))


@dataclass(frozen=True)
class Scheme:
    """How a matrix is stored: bits of a level, inputs that share a scale, None for all of them."""

    bits: int
    group_size: int | None = None
    symmetric: bool = True

    def num_groups(self, width: int) -> int:
        """Scales of one output of so many inputs."""
        return 1 if self.group_size is None else width // self.group_size


@dataclass(frozen=True)
class Levels:
    """A matrix in few bits: levels int8 [out, in], scale [out, groups], zero point int8 or None.

    Each may have further dimensions in front.
    """

    levels: Tensor
    scale: Tensor
    zero_point: Tensor | None = None


def rounded(weight: Tensor, scheme: Scheme, grid: Grid = "full", clip: Clip = "none") -> Levels:
    """A matrix [out, in], rounded to nearest.

    clip: "mse" makes the range of each group smaller, by that of RANGE_SHARES which leaves the
    least squared error. A group of zeros has the scale eps, and stays zeros.
    """
    lowest, highest = _range_of(weight, scheme)
    if clip == "mse":
        share = _best_shares(weight, lowest, highest, scheme, grid)
        lowest, highest = lowest * share, highest * share
    scale, zero_point = _scales(lowest, highest, weight.dtype, scheme, grid)
    return Levels(nearest(weight, scale, zero_point, scheme, grid), scale, zero_point)


def nearest(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme, grid: Grid = "full"
) -> Tensor:
    """The nearest levels for given scales: int8, in the shape of the weight [out, in].

    scale, zero_point: [out, groups]; as many inputs as there are, divided evenly, share one.
    """
    groups = _wide(weight).unflatten(-1, (scale.shape[-1], -1))
    quotient = groups / scale.to(groups.dtype)[..., None]
    if zero_point is not None:
        quotient += zero_point[..., None]
    least, most = _bounds(scheme.bits, grid)
    levels: Tensor = quotient.clamp_(least, most).round_().to(torch.int8).flatten(-2)
    return levels


def dequantised(stored: Levels) -> Tensor:
    """The matrix that a reader makes of what is stored, in float32 or better, before its dtype."""
    scale = _wide(stored.scale)
    groups = stored.levels.to(scale.dtype).unflatten(-1, (scale.shape[-1], -1))
    if stored.zero_point is not None:
        groups = groups - stored.zero_point.to(scale.dtype)[..., None]
    read: Tensor = (groups * scale[..., None]).flatten(-2)
    return read


def _wide(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _bounds(bits: int, grid: Grid) -> tuple[int, int]:
    """The lowest and the highest level."""
    most: int = 2 ** (bits - 1) - 1
    return (-most if grid == "restricted" else -most - 1), most


def _range_of(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The smallest and largest weight of each group, in float32; 0 lies between."""
    number = scheme.num_groups(weight.shape[-1])
    lowest, highest = weight.unflatten(-1, (number, -1)).aminmax(dim=-1)
    return _wide(lowest).clamp(max=0), _wide(highest).clamp(min=0)


def _scales(
    lowest: Tensor, highest: Tensor, dtype: torch.dtype, scheme: Scheme, grid: Grid
) -> tuple[Tensor, Tensor | None]:
    """Scale, in this dtype, and zero point of groups whose weights lie in this range."""
    least, most = _bounds(scheme.bits, grid)
    if scheme.symmetric:
        steps = float(most) if grid == "restricted" else (most - least) / 2
        return _not_zero((torch.maximum(-lowest, highest) / steps).to(dtype)), None
    scale = _not_zero(((highest - lowest) / (most - least)).to(dtype))
    zero_point = (least - lowest / scale.to(lowest.dtype)).clamp(least, most).round()
    # Of a group of zeros any will do; a reader who packs them has 0 for it.
    return scale, torch.where(highest == lowest, 0, zero_point).to(torch.int8)


def _not_zero(scale: Tensor) -> Tensor:
    eps = torch.finfo(scale.dtype).eps
    return torch.where(scale == 0, torch.full_like(scale, eps), scale)


def _best_shares(
    weight: Tensor, lowest: Tensor, highest: Tensor, scheme: Scheme, grid: Grid
) -> Tensor:
    """Of each group that of RANGE_SHARES with the least squared error; the first of equals."""
    groups = _wide(weight).unflatten(-1, (lowest.shape[-1], -1))
    best = torch.full_like(lowest, torch.inf)
    shares = torch.ones_like(lowest)
    for share in RANGE_SHARES:
        scale, zero_point = _scales(lowest * share, highest * share, weight.dtype, scheme, grid)
        levels = nearest(weight, scale, zero_point, scheme, grid)
        read = dequantised(Levels(levels, scale, zero_point)).unflatten(-1, (lowest.shape[-1], -1))
        error = (read - groups).square().sum(dim=-1)
        shares = torch.where(error < best, share, shares)
        best = torch.minimum(best, error)
    return shares
