"""How far apart two hidden states are: divergences of their softmax over the hidden dimension.

CD-MoE (2412.00069, released code): u, v = softmax(h) over the hidden dimension of the hidden
state itself, 1e-10 added to every probability inside the logarithms; in nats. Each is a function
of the intact state's `probability` u_TD and the candidate's hidden state, and gives one value a
token; both are computed in forms that do not subtract nearly equal numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

EPSILON = 1e-10
HELD_IN_CACHE = 2**15  # numbers at a time: what is computed of them stays in a CPU's cache
Divergence = Callable[[Tensor, Tensor], Tensor]  # of what `probability` gave, and a hidden state


def probability(hidden_TD: Tensor) -> Tensor:
    """softmax(h) + 1e-10 over the hidden dimension [T, D], in float32 or better."""
    exact = hidden_TD if hidden_TD.dtype == torch.float64 else hidden_TD.float()
    return exact.softmax(dim=-1).add_(EPSILON)


def weighted_mean(weight_T: Tensor, value_T: Tensor) -> Tensor:
    """The mean of values a token [T], by each token's share in it, in float64."""
    return weight_T @ value_T.double()


def _few_rows(measure: Divergence) -> Divergence:
    """The same, a few tokens at a time on a CPU."""

    @functools.wraps(measure)
    def values(u_TD: Tensor, candidate_TD: Tensor) -> Tensor:
        if u_TD.device.type != "cpu":
            return measure(u_TD, candidate_TD)
        rows = max(1, HELD_IN_CACHE // u_TD.shape[1])
        parts = zip(u_TD.split(rows), candidate_TD.split(rows), strict=True)
        return torch.cat([measure(u, candidate) for u, candidate in parts])

    return values


@_few_rows
def js(u_TD: Tensor, candidate_TD: Tensor) -> Tensor:
    """Jensen-Shannon divergence [T]: KL(u||m)/2 + KL(v||m)/2 with m = (u + v)/2.

    Computed as sum_d m (log(1-r^2) + 2 r atanh(r)) / 2 with r = (v-u)/(v+u).
    """
    v = probability(candidate_TD)
    total = u_TD + v
    edge = 1 - torch.finfo(total.dtype).eps / 2  # r rounds to 1 where u and v share no mass
    r = v.sub_(u_TD).div_(total).clamp_(-edge, edge)
    inner = torch.log1p(-r * r).add_(r.atanh().mul_(r), alpha=2)
    return inner.mul_(total).sum(dim=-1) / 4


@_few_rows
def kl(u_TD: Tensor, candidate_TD: Tensor) -> Tensor:
    """Kullback-Leibler divergence [T] of the candidate from the intact state: KL(u||v).

    Computed as sum_d u (r - log(v/u)) with r = (v-u)/u, since u and v have the same sum; the
    logarithm is log(1+r) where u and v are near each other.
    """
    v = probability(candidate_TD)
    r = (v - u_TD).div_(u_TD)
    logarithm = torch.where(r < -0.5, (v / u_TD).log(), r.log1p())
    return (r - logarithm).mul_(u_TD).sum(dim=-1)
