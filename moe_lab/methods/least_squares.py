"""The columns of a layer's down projection by linear least squares.

A layer adds sum over n of z_n w_n to the state of a token: z [N] what its hidden units compute, w_n
[D] their columns of the down projection. With a weight for each token, and columns v_n that were
good before (the prior: the paper's, or those of the intact layer), the columns are those with least

    sum over tokens of weight_t |z_t W - y_t|^2 + sum over n of lambda_n |w_n - v_n|^2,
    W = V + (G + L)^-1 (B - G V),    G = sum w z z^T,  B = sum w z y^T,  L = diag(lambda).

So a large ridge leaves the prior as it is, and does not shrink it. Only G [N, N] and B [N, D] are
kept of the tokens: in float64, and in float32 from LARGE units on.
Letters: N hidden units, D hidden size, T tokens, C ridges that are compared, S sketched outputs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_lab.methods.ridge import BLOCK, RIDGES, Ridge, factored, mirror, substituted
from moe_lab.types import NotFinite, UserError

LARGE = 4096  # hidden units from which on sums are float32: a float64 matrix of them is 134 MB
SKETCH = 64  # directions of the hidden state in which ridges are compared, where it is wide


class TokenRows(NamedTuple):
    """Some tokens of one layer.

    z_TN: what its hidden units compute; y_TD: what their columns should add up to; weight_T: what
    the squared error of each token weighs.
    """

    z_TN: Tensor
    y_TD: Tensor
    weight_T: Tensor


class NormalEquations:
    """All that a least-squares fit needs of the tokens: G, B, sum of w |y|^2."""

    def __init__(self, num_units: int, size: int, device: torch.device | str = "cpu"):
        dtype = torch.float64 if num_units < LARGE else torch.float32
        self._gram_NN = torch.zeros(num_units, num_units, dtype=dtype, device=device)
        self._is_whole = True  # else only the lower triangle is up to date
        self.cross_ND = torch.zeros(num_units, size, dtype=dtype, device=device)
        self.square = 0.0
        self.num_rows = 0

    @property
    def gram_NN(self) -> Tensor:
        """G, both triangles."""
        if not self._is_whole:
            mirror(self._gram_NN, upper=False)
            self._is_whole = True
        return self._gram_NN

    def add(self, rows: TokenRows) -> None:
        """Count these tokens in, with products in the dtype of the rows. NotFinite: nothing added.

        Half of the matrix is computed: G is symmetric.
        """
        for z_TN, y_TD, weight_T in _parts(rows):
            root_T1 = weight_T.sqrt()[:, None]
            z_TN, y_TD = z_TN * root_T1, y_TD * root_T1
            square = float(y_TD.double().square().sum())
            if not math.isfinite(square) or not bool(z_TN.square().sum().isfinite()):
                raise NotFinite(_not_finite(TokenRows(z_TN, y_TD, weight_T)))
            self._is_whole = False
            for start in range(0, len(self.cross_ND), BLOCK):
                some_TM = z_TN[:, start : start + BLOCK]
                _add_product(
                    self._gram_NN[start:, start : start + BLOCK], z_TN[:, start:].T, some_TM
                )
            _add_product(self.cross_ND, z_TN.T, y_TD)
            self.square += square
            self.num_rows += len(z_TN)

    def of(self, units_K: Tensor) -> NormalEquations:
        """Those of these units alone, in this order."""
        part = NormalEquations(len(units_K), self.cross_ND.shape[1], self.cross_ND.device)
        part._gram_NN.copy_(self.gram_NN[units_K][:, units_K])
        part.cross_ND.copy_(self.cross_ND[units_K])
        part.square, part.num_rows = self.square, self.num_rows
        return part

    def error(self, columns_ND: Tensor) -> float:
        """sum w |z W - y|^2 / sum w |y|^2 of these columns, from the sums alone."""
        columns_ND, total = columns_ND.to(self.cross_ND.dtype), self.square
        for start in range(0, len(columns_ND), BLOCK):
            rows = slice(start, start + BLOCK)
            change_MD = self.gram_NN[rows] @ columns_ND - 2 * self.cross_ND[rows]
            total += float((columns_ND[rows] * change_MD).sum(dtype=torch.float64))
        return max(total, 0.0) / (self.square or 1.0)


def _parts(rows: TokenRows) -> Iterator[TokenRows]:
    """The rows, BLOCK at a time."""
    for start in range(0, len(rows.z_TN), BLOCK):
        yield TokenRows(*(part[start : start + BLOCK] for part in rows))


def _add_product(sum_MD: Tensor, left_MT: Tensor, right_TD: Tensor) -> None:
    """sum += left right, without a copy where the dtypes are the same."""
    if sum_MD.dtype == left_MT.dtype:
        sum_MD.addmm_(left_MT, right_TD)
    else:
        sum_MD += left_MT @ right_TD


def _not_finite(rows: TokenRows) -> str:
    named = zip(("a hidden unit", "a target", "a weight"), rows, strict=True)
    bad = [name for name, values in named if not bool(values.isfinite().all())]
    return (
        "least squares: " + " and ".join(bad) + " of a token is NaN, infinite or a negative weight"
        if bad
        else "least squares: values of a token are too large for their squares to be added"
    )


class Fit(NamedTuple):
    """New columns [N, D] and how good they are; errors are relative, as `NormalEquations.error`.

    ridge: as chosen, or as much larger as the factor needed; error: on all that was fitted, held
    rows included; held_error, prior_error: of the chosen ridge on the held rows before these were
    added, and of the prior on them (where the hidden state is wide, in a sketch of it).
    """

    columns_ND: Tensor
    ridge: Ridge
    error: float
    held_error: float
    prior_error: float


def solved(equations: NormalEquations, prior_ND: Tensor, ridge: Ridge) -> Tensor:
    """W = V + (G + L)^-1 (B - G V), [N, D] in the dtype of the sums."""
    prior_ND = prior_ND.to(equations.cross_ND.dtype)
    return prior_ND + _solution(equations, _gap(equations, prior_ND), ridge)[0]


def _gap(equations: NormalEquations, prior_ND: Tensor) -> Tensor:
    """B - G V: what the prior leaves to be done."""
    if not bool(prior_ND.isfinite().all()):
        raise NotFinite("least squares: a column of the down projection is not finite")
    return equations.cross_ND - equations.gram_NN @ prior_ND


def _solution(equations: NormalEquations, gap_ND: Tensor, ridge: Ridge) -> tuple[Tensor, Ridge]:
    gram_NN = equations.gram_NN
    with factored(gram_NN, ridge) as found:
        return substituted(gram_NN, gap_ND), found


def fitted(
    equations: NormalEquations,
    held: Callable[[], Iterable[TokenRows]],
    prior_ND: Tensor,
    ridges: Sequence[Ridge] = RIDGES,
) -> Fit:
    """The columns with the ridge that does best on the held rows, then fitted to these too.

    `equations` has the held rows in it afterwards. held: read twice, the same rows each time.
    """
    if not ridges:
        raise UserError("no ridge to choose from: name one at least")
    prior_ND = prior_ND.to(equations.cross_ND.dtype)
    sketch_DS = _sketch(prior_ND)
    some_NS = prior_ND if sketch_DS is None else prior_ND @ sketch_DS
    gap_ND = _gap(equations, prior_ND)
    gap_NS = gap_ND if sketch_DS is None else gap_ND @ sketch_DS
    del gap_ND
    each = [some_NS + _solution(equations, gap_NS, ridge)[0] for ridge in ridges]
    *errors, prior_error = _judged(held(), [*each, some_NS], sketch_DS)
    del each
    for rows in held():
        equations.add(rows)
    best = min(range(len(ridges)), key=errors.__getitem__)
    change_ND, ridge = _solution(equations, _gap(equations, prior_ND), ridges[best])
    columns_ND = change_ND.add_(prior_ND)
    return Fit(columns_ND, ridge, equations.error(columns_ND), errors[best], prior_error)


def _sketch(prior_ND: Tensor) -> Tensor | None:
    """Random directions [D, SKETCH], squares in which are right on the average; None: D is small.

    Each output has a problem of its own, and all have the same factor: solving for a few is enough
    to see which ridge is best, and takes D / SKETCH times less of the triangular solves.
    """
    size = prior_ND.shape[1]
    if size <= 8 * SKETCH:
        return None
    generator = torch.Generator().manual_seed(0)
    sketch_DS: Tensor = torch.randn(size, SKETCH, generator=generator) / SKETCH**0.5
    return sketch_DS.to(prior_ND)


def _judged(
    held: Iterable[TokenRows], each: Sequence[Tensor], sketch_DS: Tensor | None
) -> list[float]:
    """The relative error on the held rows of each of some columns, [N, D] or [N, S] sketched."""
    columns_NX = torch.cat(list(each), dim=1)
    error_C = torch.zeros(len(each), dtype=torch.float64, device=columns_NX.device)
    square, number = 0.0, 0
    for z_TN, y_TD, weight_T in itertools.chain.from_iterable(_parts(rows) for rows in held):
        columns_NX = columns_NX.to(z_TN.dtype)
        y_TS = y_TD if sketch_DS is None else y_TD @ sketch_DS.to(y_TD.dtype)
        off_TCS = (z_TN @ columns_NX).view(len(z_TN), len(each), -1) - y_TS[:, None]
        error_C += weight_T.double() @ off_TCS.square().sum(dim=2).double()
        square += float(weight_T.double() @ y_TS.square().sum(dim=1).double())
        number += len(z_TN)
    if not number:
        raise UserError("no held-out tokens to choose the ridge on: keep some documents for that")
    if not math.isfinite(square) or not bool(error_C[-1].isfinite()):
        raise NotFinite("least squares: held-out tokens with values that are not finite")
    errors = (error_C / (square or 1.0)).nan_to_num(nan=math.inf, posinf=math.inf)
    return [float(error) for error in errors]
