"""GPTQ (2210.17323): one input's weights after another are rounded, the rest makes up for each.

Of a matrix W [out, in] whose inputs on calibration tokens have the Hessian H = 2/n sum x x^T, the
squared error of its outputs is tr (W - Q) H (W - Q)^T / 2. With U the upper Cholesky factor of
H^-1 (H^-1 = U^T U), column i is rounded to q, and its error e = (w_i - q) / U_ii is taken off the
columns behind it: w_j -= e U_ij. So each rounding is followed by the best change of all weights
that are not rounded yet (OBQ, 2208.11580), in an order that all outputs share.

As llm-compressor has it: columns whose inputs are always 0 get the weight 0; damping is added to
the diagonal; scales are those of the weights before any change, also where columns are taken in the
order of falling diagonals ("static"), so that what is stored has no order. Where H has no Cholesky
factor, what is left is rounding to nearest (H = I).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe_lab.models.rounding import Clip, Grid, Levels, Scheme, rounded

COLUMNS_AT_ONCE = 128  # columns whose errors reach the columns behind the block in one product
DAMPING = 0.01  # of the mean of the diagonal
ACT_ORDERS = ("static", "none")


class LevelChoice(NamedTuple):
    """How levels are chosen: the stored scheme, its grid, clipping of ranges, order of columns."""

    scheme: Scheme
    grid: Grid = "full"
    clip: Clip = "none"
    act_order: str = "static"
    damping: float = DAMPING


class HessianSum:
    """2/n sum x x^T [I, I] of n tokens' inputs, which come in parts [m, I].

    Products are in float32 or better, sums in float64.
    """

    def __init__(self) -> None:
        self.number = 0
        self._total: Tensor | None = None

    def add(self, x_MI: Tensor) -> None:
        """Take in some tokens."""
        x_MI = x_MI.to(torch.promote_types(x_MI.dtype, torch.float32))
        product = x_MI.T @ x_MI
        self._total = product.double() if self._total is None else self._total.add_(product)
        self.number += len(x_MI)

    def value(self) -> Tensor:
        """The Hessian, in float32; there has to be a token."""
        assert self._total is not None
        return (self._total * (2 / self.number)).float()


def gptq(weight: Tensor, hessian_II: Tensor, given: LevelChoice) -> Levels:
    """A matrix [out, in], every output at once, for inputs with this Hessian [in, in]."""
    stored = rounded(weight, given.scheme, given.grid, given.clip)
    dead_I = hessian_II.diagonal() == 0
    order_I = _order(hessian_II, given.act_order)
    upper = _factor(hessian_II, dead_I, order_I, given.damping)
    if upper is None:
        return stored
    columns = weight.float().masked_fill(dead_I, 0.0).T[order_I].contiguous()
    grid = _Grid(stored, given, order_I)
    chosen = torch.empty(columns.shape, dtype=torch.int8, device=weight.device)
    for start in range(0, len(columns), COLUMNS_AT_ONCE):
        end = min(start + COLUMNS_AT_ONCE, len(columns))
        errors = _round_block(columns, chosen, upper, grid, start, end)
        if end < len(columns):
            columns[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    levels = torch.empty_like(chosen)
    levels[order_I] = chosen
    return Levels(levels.T.contiguous(), stored.scale, stored.zero_point)


def _order(hessian_II: Tensor, act_order: str) -> Tensor:
    """In which order columns are rounded: those of the largest inputs first, or as they stand."""
    if act_order == "none":
        return torch.arange(len(hessian_II), device=hessian_II.device)
    return hessian_II.diagonal().argsort(descending=True, stable=True)


def _factor(hessian_II: Tensor, dead_I: Tensor, order_I: Tensor, damping: float) -> Tensor | None:
    """U with (H + damping)^-1 = U^T U, columns in this order; None where there is none.

    With the order of rows and columns turned round, the Cholesky factor of H gives H = R R^T, R
    upper: then U = R^-1, and nothing is inverted but a triangle.
    """
    damped = hessian_II.masked_fill(torch.diag(dead_I), 1.0)
    damped.diagonal().add_(damping * damped.diagonal().mean())
    turned = damped[order_I][:, order_I].flip(0, 1)
    lower, failed = torch.linalg.cholesky_ex(turned)
    if bool(failed):
        return None
    one = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    inverse = torch.linalg.solve_triangular(lower, one, upper=False)
    upper: Tensor = inverse.flip(0, 1).float().contiguous()
    return upper if bool(upper.isfinite().all()) else None


class _Grid:
    """Scales and zero points of each column in the order in which they are rounded [in, out]."""

    def __init__(self, stored: Levels, given: LevelChoice, order_I: Tensor):
        each = len(order_I) // stored.scale.shape[-1]
        self.group_I = (order_I // each).tolist()
        self.scales = stored.scale.T.contiguous()
        self.zeros = None if stored.zero_point is None else stored.zero_point.T.float()
        most = 2 ** (given.scheme.bits - 1) - 1
        self.least, self.most = (-most if given.grid == "restricted" else -most - 1), most

    def nearest(self, place: int, column: Tensor) -> tuple[Tensor, Tensor]:
        """The levels of one column [out], and what a reader makes of them, in float32."""
        group = self.group_I[place]
        scale, zero = self.scales[group], None if self.zeros is None else self.zeros[group]
        levels = column / scale.float()
        levels = levels if zero is None else levels.add_(zero)
        levels = levels.clamp_(self.least, self.most).round_()
        offset = levels if zero is None else levels - zero
        return levels, offset * scale.float()


def _round_block(
    columns: Tensor, chosen: Tensor, upper: Tensor, grid: _Grid, start: int, end: int
) -> Tensor:
    """Round the columns of a block; their errors by U's diagonal [block, out]."""
    block = columns[start:end]
    errors = torch.empty_like(block)
    inside = upper[start:end, start:end]
    diagonal = inside.diagonal().tolist()
    for place in range(end - start):
        levels, read = grid.nearest(start + place, block[place])
        torch.sub(block[place], read, out=errors[place]).div_(diagonal[place])
        chosen[start + place] = levels
        block[place + 1 :].addr_(inside[place, place + 1 :], errors[place], alpha=-1)
    return errors
