"""A layer whose experts are in few bits for a while, as a quantised checkpoint would have them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from moe_lab.models.expert_matrices import expert_matrices, other_matrices
from moe_lab.models.hidden_units import HiddenUnits
from moe_lab.models.layers import MoELayer
from moe_lab.models.rounding import Clip, Grid, Scheme, dequantised, rounded


@contextmanager
def rounded_layer(
    layer: MoELayer,
    scheme: Scheme,
    grid: Grid = "full",
    clip: Clip = "none",
    kept_EI: Tensor | None = None,
) -> Iterator[None]:
    """While open, the experts' matrices are what a reader makes of their levels.

    kept_EI: hidden units that stay, as many of each expert (bool), where others go before: scales
    are of what stays.
    """
    units = HiddenUnits(layer.experts)
    values = {}
    for name, matrix_EOI in expert_matrices(layer.experts).items():
        kept = kept_EI if name == units.down else None
        parts = [
            _read(matrix, scheme, grid, clip, None if kept is None else kept[expert])
            for expert, matrix in enumerate(matrix_EOI.detach())
        ]
        values[name] = torch.stack(parts)
    with other_matrices(layer.experts, values):
        yield


def _read(matrix: Tensor, scheme: Scheme, grid: Grid, clip: Clip, kept_I: Tensor | None) -> Tensor:
    """A matrix [out, in] as it is read; inputs that go are as they were."""
    if kept_I is None:
        return dequantised(rounded(matrix, scheme, grid, clip))
    place = kept_I.nonzero()[:, 0].to(matrix.device)
    read = matrix.clone()
    read[:, place] = dequantised(rounded(matrix[:, place], scheme, grid, clip))
    return read
