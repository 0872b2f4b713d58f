"""The levels of one expert's matrices, rounded to nearest or by GPTQ on the tokens that it gets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from moe_lab.models.expert_matrices import expert_matrices, own_part
from moe_lab.models.hidden_units import HiddenUnits
from moe_lab.models.layers import MoELayer
from moe_lab.models.rounding import Levels, dequantised, rounded
from moe_lab.quantize.column_rounding import LevelChoice, gptq

Hessians = tuple[Tensor, Tensor]  # of an expert's inputs, of its hidden units


def expert_levels(
    layer: MoELayer, expert: int, given: LevelChoice, hessians: Hessians | None, dtype: torch.dtype
) -> dict[str, Levels]:
    """The levels of an expert's matrices by name; rounded to nearest where there are no Hessians.

    dtype: that of the weights in the files, which scales have.
    """
    found, down = {}, HiddenUnits(layer.experts).down
    for name in expert_matrices(layer.experts):
        matrix = own_part(layer.experts, name, expert).detach().to(dtype)
        found[name] = levels_of(matrix, given, hessians and hessians[name == down])
    return found


def levels_of(matrix: Tensor, given: LevelChoice, hessian_II: Tensor | None) -> Levels:
    """The levels of a matrix [out, in], rounded to nearest where it has no Hessian."""
    if hessian_II is None:
        return rounded(matrix, given.scheme, given.grid, given.clip)
    return gptq(matrix, hessian_II, given)


@torch.no_grad()
def put_levels(layer: MoELayer, expert: int, levels: Mapping[str, Levels]) -> None:
    """Let an expert compute with what a reader makes of its levels, in place."""
    for name, one in levels.items():
        own_part(layer.experts, name, expert).copy_(dequantised(one))


@contextmanager
def with_levels(layer: MoELayer, expert: int, levels: Mapping[str, Levels]) -> Iterator[None]:
    """The same while it is open."""
    before = {name: own_part(layer.experts, name, expert).detach().clone() for name in levels}
    put_levels(layer, expert, levels)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                own_part(layer.experts, name, expert).copy_(value)
