"""Hidden units removed one after another, what stays refitted in closed form each time.

A layer adds W z to the state of a token: z [N] what its hidden units compute, times the router's
weights, W [D, N] their columns of the down projection. With G = sum over tokens of w_t z z^T, w_t
a token's weight, the columns of the units that stay are chosen anew (W'; those that go are zero) so
that least is

    sum over tokens of w_t ||W' z - W z||^2 + lambda ||W' - W||^2
        = tr (W' - W) H (W' - W)^T,    H = G + lambda I,    lambda = ridge * mean of G's diagonal.

So a large ridge leaves the columns that stay as they are, and does not shrink them. That is the
problem of Optimal Brain Surgeon (Hassibi and Stork 1993; for layers OBC, 2208.11580; ZipLM,
2302.04089) with H as Hessian: without unit q the loss grows by ||w_q||^2 / P_qq, P = H^-1, the
best change of the others is -w_q P_q / P_qq, and P loses P_q P_q^T / P_qq. After any number of
removals W' is the minimum itself: `refitted` finds it at once, for any set.

All in float64. Letters: N hidden units, of one expert or of all of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_lab.methods.ridge import Ridge, cholesky

AT_ONCE = 64  # removals between two updates of whole matrices


@dataclass(frozen=True)
class Removals:
    """Hidden units in the order in which they go [N], and by how much the loss grows each time."""

    unit_N: Tensor
    cost_N: Tensor


def hessian(gram_NN: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """H = G + lambda I and its lower Cholesky factor, [N, N] each, in float64.

    Where units say nothing new, as fewer tokens than units do, G is singular: lambda is never tiny,
    and as much larger as rounding makes needed (`ridge.cholesky`). G of zeros gives H = I: nothing
    is known but the columns.
    """
    h_NN = gram_NN.to(torch.float64, copy=True)
    factor_NN, found = cholesky(h_NN, Ridge(ridge))
    h_NN.diagonal().add_(found.added(h_NN.diagonal()))
    return h_NN, factor_NN


def refitted(gram_NN: Tensor, columns_ND: Tensor, kept_N: Tensor, ridge: float) -> Tensor:
    """The columns [N, D] (float64) of the units that stay ([N] bool), refitted; zeros elsewhere."""
    columns_ND = columns_ND.double()
    kept, gone = kept_N.nonzero()[:, 0], (~kept_N).nonzero()[:, 0]
    new_ND = torch.zeros_like(columns_ND)
    h_NN, _ = hessian(gram_NN, ridge)
    factor_KK = torch.linalg.cholesky(h_NN[kept][:, kept])
    change_KD = h_NN[kept][:, gone] @ columns_ND[gone]
    new_ND[kept] = columns_ND[kept] + torch.cholesky_solve(change_KD, factor_KK)
    return new_ND


def one_by_one(
    gram_NN: Tensor,
    columns_ND: Tensor,
    ridge: float,
    expert_N: Tensor | None = None,
) -> Removals:
    """All units, always the one next without which the refitted loss grows least.

    expert_N: whose each unit is; then they go in rounds, one of each expert in a round, so that all
    experts are equally wide after any of them. Ties: the lower unit goes first.
    """
    state = _State(gram_NN, columns_ND, ridge)
    number = len(gram_NN)
    units = torch.empty(number, dtype=torch.long)
    costs = torch.empty(number, dtype=torch.float64)
    done_N = torch.zeros(number, dtype=torch.bool)  # of an expert that has lost one in this round
    for step in range(number):
        if bool((done_N | ~state.left).all()):
            done_N = torch.zeros(len(done_N), dtype=torch.bool)
        place = int(state.costs().masked_fill_(done_N, torch.inf).argmin())
        units[step], costs[step] = state.units[place], state.costs()[place]
        if expert_N is not None:
            done_N |= expert_N[state.units] == expert_N[state.units[place]]
        state.remove(place)
        if state.is_full:
            done_N = done_N[state.left]
            state.update()
    return Removals(units, costs)


class _State:
    """P and S = W'^T W' of the units that are left, with the removals since both were computed.

    A removal changes P by -u u^T and S by -(u a^T + a u^T), with u = P_q / sqrt(P_qq) and
    a = S_q / sqrt(P_qq) - S_qq / (2 P_qq) u: the columns themselves are not needed. Their diagonals
    are always known, whole columns are computed where they are asked for, and every AT_ONCE
    removals both matrices are updated, and lose what has gone.
    """

    def __init__(self, gram_NN: Tensor, columns_ND: Tensor, ridge: float):
        h_NN, factor_NN = hessian(gram_NN, ridge)
        self.units = torch.arange(len(h_NN))
        self.p_NN = torch.cholesky_inverse(factor_NN) if len(h_NN) else h_NN
        columns_ND = columns_ND.double()
        self.s_NN = columns_ND @ columns_ND.T
        self.least_N = 1 / h_NN.diagonal()  # P_qq is never below, whatever has gone
        self._begin()

    def _begin(self) -> None:
        size = len(self.units), AT_ONCE
        self.u_NR = torch.zeros(size, dtype=torch.float64)
        self.a_NR = torch.zeros(size, dtype=torch.float64)
        self.number = 0
        self.left = torch.ones(len(self.units), dtype=torch.bool)
        self.p_N = torch.maximum(self.p_NN.diagonal(), self.least_N)
        self.s_N = self.s_NN.diagonal().clamp(min=0)

    @property
    def is_full(self) -> bool:
        return self.number == AT_ONCE

    def costs(self) -> Tensor:
        """By how much the loss grows without each unit; infinite where it has gone."""
        return (self.s_N / self.p_N).masked_fill_(~self.left, torch.inf)

    def remove(self, place: int) -> None:
        u_NR, a_NR = self.u_NR[:, : self.number], self.a_NR[:, : self.number]
        pivot, square = self.p_N[place], self.s_N[place]
        p_N = self.p_NN[place] - u_NR @ u_NR[place]
        s_N = self.s_NN[place] - u_NR @ a_NR[place] - a_NR @ u_NR[place]
        u_N = p_N / pivot.sqrt()
        a_N = s_N / pivot.sqrt() - square / (2 * pivot) * u_N
        self.u_NR[:, self.number], self.a_NR[:, self.number] = u_N, a_N
        self.number += 1
        self.p_N = torch.maximum(self.p_N - u_N.square(), self.least_N)
        self.s_N = (self.s_N - 2 * u_N * a_N).clamp(min=0)
        self.left[place] = False

    def update(self) -> None:
        """Both matrices of what is left."""
        left = self.left.nonzero()[:, 0]
        u_NR, a_NR = self.u_NR[left], self.a_NR[left]
        self.p_NN = self.p_NN[left][:, left].addmm_(u_NR, u_NR.T, alpha=-1)
        self.s_NN = self.s_NN[left][:, left].addmm_(u_NR, a_NR.T, alpha=-1)
        self.s_NN.addmm_(a_NR, u_NR.T, alpha=-1)
        self.units, self.least_N = self.units[left], self.least_N[left]
        self._begin()


def in_turn(each: Sequence[Removals], evenly: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The removals of several experts, each by itself, as one order: (expert, unit, cost), [N].

    evenly: in rounds, one of each expert in a round; else always of the expert whose next one
    costs least, where an expert's later ones are never cheaper than its earlier ones.
    """
    cost = [one.cost_N if evenly else one.cost_N.cummax(0).values for one in each]
    expert_N = torch.cat([torch.full_like(one.unit_N, e) for e, one in enumerate(each)])
    unit_N = torch.cat([one.unit_N for one in each])
    order_N = torch.cat(cost).argsort(stable=True)
    if evenly:
        round_N = torch.cat([torch.arange(len(one.unit_N)) for one in each])
        order_N = order_N[round_N[order_N].argsort(stable=True)]
    cost_N = torch.cat([one.cost_N for one in each])
    return expert_N[order_N], unit_N[order_N], cost_N[order_N]


def rising(cost_N: Tensor, whole: float) -> Tensor:
    """The loss after each removal as a share of `whole`, strictly rising: scores in this order."""
    totals: list[float] = (cost_N.cumsum(0) / (whole or 1.0)).tolist()
    for place in range(1, len(totals)):
        totals[place] = max(totals[place], math.nextafter(totals[place - 1], math.inf))
    return torch.tensor(totals, dtype=torch.float64)
