"""A ridge, and the Cholesky factor of a Gram matrix with it, in place.

The factor of G + L stands in the lower triangle of G itself while the upper one keeps G, so that
any number of ridges is tried without a second matrix: half a gigabyte each at the size of real
layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_lab.types import NotFinite, UserError

BLOCK = 1024  # rows and columns of a matrix that are worked on at once
SCALES = ("mean", "unit")
UNIT_FLOOR = 1e-6  # of the mean diagonal: what a unit that hardly says anything counts for


@dataclass(frozen=True)
class Ridge:
    """How much the columns are held to the prior: lambda_n, for each unit.

    scale: "mean", strength times the mean of G's diagonal, the same for all; "unit", strength
    times the unit's own entry, so that it does not matter how large a unit's values are.
    """

    strength: float
    scale: str = "mean"

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise UserError(f"a ridge of scale {self.scale}: it is one of {', '.join(SCALES)}")
        if not 0 <= self.strength < math.inf:
            raise UserError(f"a ridge of strength {self.strength}: it is a number from 0 on")

    def added(self, diagonal_N: Tensor) -> Tensor:
        """lambda [N] for G with this diagonal; ones where G is zero: only the prior is known."""
        mean = float(diagonal_N.double().mean()) if len(diagonal_N) else 0.0
        if not mean > 0:
            return torch.ones_like(diagonal_N)
        if self.scale == "mean":
            return torch.full_like(diagonal_N, self.strength * mean)
        return self.strength * diagonal_N.clamp(min=UNIT_FLOOR * mean)

    def at_least(self, dtype: torch.dtype) -> Ridge:
        """The same, and not so small that rounding in this dtype decides."""
        least = 1e-10 if dtype == torch.float64 else 1e-6
        return replace(self, strength=max(self.strength, least))


STRENGTHS = tuple(10.0**power for power in range(-6, 2))
RIDGES = tuple(Ridge(strength, scale) for scale in SCALES for strength in STRENGTHS)


def mirror(matrix_NN: Tensor, *, upper: bool) -> None:
    """The one triangle copied over the other, in place: the upper one if upper, else the lower."""
    matrix_NN = matrix_NN if upper else matrix_NN.T
    for start in range(0, len(matrix_NN), BLOCK):
        some = slice(start, start + BLOCK)
        matrix_NN[start + BLOCK :, some] = matrix_NN[some, start + BLOCK :].T
        strict_MM = matrix_NN[some, some].triu(1)
        matrix_NN[some, some] = matrix_NN[some, some].triu() + strict_MM.T


def _factor(matrix_NN: Tensor) -> bool:
    """The lower Cholesky factor into the lower triangle, the upper one left; False: there is none.

    By block columns, each from all before it (left-looking): products of matrices, nearly all.
    """
    for start in range(0, len(matrix_NN), BLOCK):
        some, below = slice(start, start + BLOCK), slice(start + BLOCK, None)
        before = matrix_NN[some, :start]
        square_MM = matrix_NN[some, some]
        factor_MM, failed = torch.linalg.cholesky_ex(square_MM - before @ before.T)
        if int(failed):
            return False
        square_MM.copy_(factor_MM + square_MM.triu(1))
        panel = matrix_NN[below, some].addmm_(matrix_NN[below, :start], before.T, alpha=-1)
        panel.copy_(torch.linalg.solve_triangular(factor_MM.T, panel, upper=True, left=False))
    return True


@contextmanager
def factored(gram_NN: Tensor, ridge: Ridge) -> Iterator[Ridge]:
    """While this lasts, the lower triangle is the factor of G + L; afterwards G is as it was.

    Gives the ridge, ten times as strong as long as rounding leaves no factor.
    """
    diagonal_N = gram_NN.diagonal().clone()

    def restore() -> None:
        gram_NN.diagonal().copy_(diagonal_N)
        mirror(gram_NN, upper=True)

    try:
        yield _grown(gram_NN, diagonal_N, ridge.at_least(gram_NN.dtype), restore)
    finally:
        restore()


def _grown(gram_NN: Tensor, diagonal_N: Tensor, ridge: Ridge, restore: Callable[[], None]) -> Ridge:
    while True:
        gram_NN.diagonal().copy_(diagonal_N + ridge.added(diagonal_N))
        if _factor(gram_NN):
            return ridge
        restore()
        if ridge.strength > 1e20:
            raise NotFinite("least squares: the sums of products are not finite")
        ridge = replace(ridge, strength=10 * ridge.strength)


def cholesky(gram_NN: Tensor, ridge: Ridge) -> tuple[Tensor, Ridge]:
    """The lower Cholesky factor [N, N] of G + L, and the ridge, as much larger as was needed."""
    matrix_NN = gram_NN.clone()
    with factored(matrix_NN, ridge) as found:
        return matrix_NN.tril(), found


def substituted(factor_NN: Tensor, right_ND: Tensor) -> Tensor:
    """(F F^T)^-1 right: only the lower triangle is looked at."""
    half_ND = half_substituted(factor_NN, right_ND)
    found_ND: Tensor = torch.linalg.solve_triangular(factor_NN.T, half_ND, upper=True)
    return found_ND


def half_substituted(factor_MM: Tensor, right_MX: Tensor) -> Tensor:
    """F^-1 right."""
    found_MX: Tensor = torch.linalg.solve_triangular(factor_MM, right_MX, upper=False)
    return found_MX
