"""Which hidden units a layer needs: forward orthogonal least squares.

Always the one next, or the whole group next, with which the error of the least squares of
`least_squares.py` is least, all others refitted (Chen, Billings and Luo 1989). The factor of the
chosen units' Gram matrix grows by a row a step, so that a choice costs one column of the Gram
matrix and not a fit for each candidate.
Letters: N hidden units, K of them chosen, D hidden size, M units of one group, R chosen so far.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe_lab.methods.least_squares import NormalEquations
from moe_lab.methods.ridge import Ridge, cholesky, half_substituted
from moe_lab.types import UserError


class Selected(NamedTuple):
    """Units in order of choice [K], and the relative error before the first and after each.

    After each group where groups are chosen, so that there is one error more than choices. It is
    the least that the fit minimises with these units, ridge included (towards zero, there being no
    prior), so that it never grows.
    """

    units_K: Tensor
    errors: list[float]


def forward_selection(
    equations: NormalEquations,
    number: int,
    ridge: Ridge,
    group_N: Tensor | None = None,
    start_K: Tensor | None = None,
) -> Selected:
    """So many units, always the one next with which the refitted error is least.

    group_N: whose each unit is ([N] integers), as that of an expert; then whole groups are chosen,
    and number counts them. start_K: units that are in it from the start, as those of the shared
    experts (their numbers, or [N] bool): not chosen and not counted; of a group that has some, the
    others are chosen. A unit that says what a chosen one does has little left, as its residual is
    only the ridge's. Ties: the lower unit or group. All in float64; a unit takes N (K + D) steps.
    """
    left_N = torch.ones(len(equations.cross_ND), dtype=torch.bool, device=equations.cross_ND.device)
    if start_K is not None:
        left_N[start_K] = False
    if group_N is None:
        return _by_unit(equations, number, ridge, left_N)
    return _by_group(equations, number, ridge, left_N, group_N)


def _by_unit(equations: NormalEquations, number: int, ridge: Ridge, left_N: Tensor) -> Selected:
    _check_number(number, int(left_N.sum()), "hidden units")
    start = (~left_N).nonzero()[:, 0].tolist()
    chosen = _Units(equations, len(start) + number, ridge)
    for unit in start:
        chosen.take(unit)
    units, errors = [], [chosen.error]
    for _ in range(number):
        gain_N = (chosen.gap_N / chosen.pivot_N).masked_fill(~left_N, -1.0)
        units.append(int(gain_N.argmax()))
        left_N[units[-1]] = False
        chosen.take(units[-1])
        errors.append(chosen.error)
    return Selected(torch.tensor(units, dtype=torch.long), errors)


def _check_number(number: int, possible: int, what: str) -> None:
    if not 0 <= number <= possible:
        raise UserError(f"{number} {what} to be chosen: there are {possible}")


class _Chosen:
    """The factor of the chosen units' G + L, seen from all units, in float64.

    With F F^T = G + L of the chosen: l_RN = F^-1 G[chosen] and q_RD = F^-1 B[chosen], so that
    G + L - l^T l and B - l^T q are what the chosen leave to the others, and sum |q|^2 is by how
    much the error has fallen.
    """

    def __init__(self, equations: NormalEquations, number: int, ridge: Ridge):
        self.gram_NN, self.square = equations.gram_NN, equations.square
        self.cross_ND = equations.cross_ND.double()
        diagonal_N = self.gram_NN.diagonal().double()
        self.added_N = ridge.at_least(self.gram_NN.dtype).added(diagonal_N)
        self.pivot_N = diagonal_N + self.added_N
        num_units, size = self.cross_ND.shape
        self.l_RN = self.cross_ND.new_zeros(number, num_units)
        self.q_RD = self.cross_ND.new_zeros(number, size)
        self.number, self.explained = 0, 0.0

    @property
    def error(self) -> float:
        return max(self.square - self.explained, 0.0) / (self.square or 1.0)

    def keep(self, l_MN: Tensor, q_MD: Tensor) -> None:
        """Rows of l and q of units that are now chosen."""
        rows = slice(self.number, self.number + len(l_MN))
        self.l_RN[rows], self.q_RD[rows] = l_MN, q_MD
        self.number += len(l_MN)
        self.explained += float(q_MD.square().sum())


class _Units(_Chosen):
    """One unit after another. gap_N: |B - l^T q|^2 of each unit; over its pivot, what it gains."""

    def __init__(self, equations: NormalEquations, number: int, ridge: Ridge):
        super().__init__(equations, number, ridge)
        self.gap_N = self.cross_ND.square().sum(dim=1)

    def take(self, unit: int) -> None:
        l_RN, q_RD = self.l_RN[: self.number], self.q_RD[: self.number]
        root, before_R = self.pivot_N[unit].sqrt(), l_RN[:, unit]
        l_N = (self.gram_NN[unit].double() - before_R @ l_RN) / root
        q_D = (self.cross_ND[unit] - before_R @ q_RD) / root
        along_N = self.cross_ND @ q_D - (q_RD @ q_D) @ l_RN
        self.gap_N += l_N * (l_N * q_D.square().sum() - 2 * along_N)
        self.gap_N.clamp_(min=0)
        self.pivot_N = torch.maximum(self.pivot_N - l_N.square(), self.added_N)
        self.keep(l_N[None], q_D[None])


def _by_group(
    equations: NormalEquations, number: int, ridge: Ridge, left_N: Tensor, group_N: Tensor
) -> Selected:
    labels = group_N[left_N].unique().tolist()
    _check_number(number, len(labels), "groups of hidden units")
    groups = {label: ((group_N == label) & left_N).nonzero()[:, 0] for label in labels}
    chosen, units = _Groups(equations, ridge, groups), [torch.zeros(0, dtype=torch.long)]
    if not bool(left_N.all()):
        chosen.take((~left_N).nonzero()[:, 0])
    errors = [chosen.error]
    for _ in range(number):
        gains = {label: chosen.gain(label) for label in groups}
        units.append(groups.pop(max(gains, key=gains.__getitem__)))
        chosen.take(units[-1])
        errors.append(chosen.error)
    return Selected(torch.cat(units), errors)


class _Groups(_Chosen):
    """One group after another. square: of each group that is left its block of G + L - l^T l."""

    def __init__(self, equations: NormalEquations, ridge: Ridge, groups: dict[int, Tensor]):
        super().__init__(equations, len(equations.cross_ND), ridge)
        self.groups = groups
        self.blocks = {label: self._block(units_M) for label, units_M in groups.items()}

    def _block(self, units_M: Tensor) -> Tensor:
        block_MM = self.gram_NN[units_M][:, units_M].double()
        block_MM.diagonal().add_(self.added_N[units_M])
        l_RM = self.l_RN[: self.number, units_M]
        return block_MM - l_RM.T @ l_RM

    def gain(self, label: int) -> float:
        """By how much the error falls with all of the group."""
        units_M = self.groups[label]
        factor_MM, _ = cholesky(self.blocks[label], Ridge(0.0))
        return float(half_substituted(factor_MM, self.cross_ND[units_M]).square().sum())

    def take(self, units_M: Tensor) -> None:
        """cross_ND loses what the group explains: a new one, the first is that of the sums."""
        l_RN = self.l_RN[: self.number]
        factor_MM, _ = cholesky(self._block(units_M), Ridge(0.0))
        row_MN = self.gram_NN[units_M].double() - l_RN[:, units_M].T @ l_RN
        l_MN = half_substituted(factor_MM, row_MN)
        q_MD = half_substituted(factor_MM, self.cross_ND[units_M])
        self.cross_ND = self.cross_ND - l_MN.T @ q_MD
        self.keep(l_MN, q_MD)
        for label, others_M in self.groups.items():
            l_MM = l_MN[:, others_M]
            self.blocks[label] -= l_MM.T @ l_MM
