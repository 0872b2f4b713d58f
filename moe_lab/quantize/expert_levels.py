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
from moe_lab.profile.routed_tokens import OfExpert, RoutedTokens
from moe_lab.quantize.column_rounding import Given, gptq, hessian

TOKEN_WEIGHTS = ("none", "gate_squared")
Hessians = Mapping[str, Tensor]  # by the names of `expert_matrices`


def expert_hessians(
    tokens: RoutedTokens, expert: int, given: OfExpert, token_weight: str
) -> dict[str, Tensor]:
    """The Hessians [in, in] of an expert's matrices: of its inputs, and of its hidden units.

    Both are of the expert as it stands. token_weight: none, as GPTQ has it; gate_squared, each
    token's products count by the square of its router weight, as the squared error of the layer's
    output has them (MoEQuant's affinity-guided one, 2505.03804, weighs by the affinity).
    """
    gate_N1 = given.gate_N[:, None] if token_weight == "gate_squared" else 1.0
    units = HiddenUnits(tokens.layer.experts)
    inputs = hessian(given.x_ND * gate_N1)
    hidden = hessian(tokens.hidden(expert, given)[:, : _width(tokens.layer, expert)] * gate_N1)
    matrices = expert_matrices(tokens.layer.experts)
    return {name: hidden if name == units.down else inputs for name in matrices}


def _width(layer: MoELayer, expert: int) -> int:
    units = HiddenUnits(layer.experts)
    return own_part(layer.experts, units.down, expert).shape[1]


def expert_levels(
    layer: MoELayer, expert: int, given: Given, hessians: Hessians | None, dtype: torch.dtype
) -> dict[str, Levels]:
    """The levels of an expert's matrices by name; rounded to nearest where there are no Hessians.

    dtype: that of the weights in the files, which scales have.
    """
    found = {}
    for name in expert_matrices(layer.experts):
        matrix = own_part(layer.experts, name, expert).detach().to(dtype)
        if hessians is None:
            found[name] = rounded(matrix, given.scheme, given.grid, given.clip)
        else:
            found[name] = gptq(matrix, hessians[name], given)
    return found


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
