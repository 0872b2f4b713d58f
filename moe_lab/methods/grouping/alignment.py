"""Which hidden units of two experts do the same work, told by what they compute on the same tokens.

Letters: E experts, I hidden units, T tokens of a chunk, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moe_lab.models.experts import Experts, expert_hidden, expert_parameters
from moe_lab.models.hidden_units import HiddenUnits
from moe_lab.profile.all_experts import AllExperts


@torch.no_grad()
def permutation(experts: AllExperts, groups: Sequence[Sequence[int]], with_weights: bool) -> Tensor:
    """In row e the unit of expert e that takes the place of each unit of its group's first, [E, I].

    The assignment with the least sum of distances (REAM, 2604.04356): Euclidean, of two units'
    activations over all tokens, each divided by its norm; `with_weights` plus those of their
    weights, divided likewise. Activations are never held: inner products are summed over chunks.
    """
    module = experts.layer.experts
    parameters, units = expert_parameters(module), HiddenUnits(module)
    found_EI = torch.arange(experts.info.expert_width).repeat(len(parameters), 1)
    x_TD = [chunk.x_TD for chunk in experts.chunks()]
    for first, *members in groups:
        if not members:
            continue
        costs = _activation_distances(module, parameters, x_TD, first, members)
        for member, cost_II in zip(members, costs, strict=True):
            if with_weights:
                one, other = (units.weights(expert).double() for expert in (first, member))
                squares = one.square().sum(dim=1), other.square().sum(dim=1)
                cost_II = cost_II + _distances(one @ other.T, *squares)
            found_EI[member] = torch.from_numpy(linear_sum_assignment(cost_II.cpu().numpy())[1])
    return found_EI


def _activation_distances(
    module: Experts,
    parameters: Sequence[dict[str, Tensor]],
    x_TD: Sequence[Tensor],
    first: int,
    members: Sequence[int],
) -> list[Tensor]:
    """For each member the distances [I, I] of its units (columns) from those of `first` (rows)."""
    zero = torch.zeros((), dtype=torch.float64)
    squares = [zero] * (1 + len(members))  # of each expert's units, [I]
    products = [zero] * len(members)  # [I, I]
    for x in x_TD:
        hidden = [expert_hidden(module, parameters[expert], x) for expert in (first, *members)]
        squares = [a + h.double().square().sum(dim=0) for a, h in zip(squares, hidden, strict=True)]
        one, *others = hidden
        products = [a + (one.T @ h).double() for a, h in zip(products, others, strict=True)]
    return [
        _distances(product_II, squares[0], square_I)
        for product_II, square_I in zip(products, squares[1:], strict=True)
    ]


def _distances(product_II: Tensor, one_I: Tensor, other_I: Tensor) -> Tensor:
    """Euclidean distances of vectors divided by their norms, from inner products and squares.

    A vector of zeros stays one.
    """
    scale_II = one_I.sqrt()[:, None] * other_I.sqrt()
    cosine_II = torch.where(scale_II > 0, product_II / scale_II, torch.zeros_like(product_II))
    norms_II = (one_I > 0).double()[:, None] + (other_I > 0).double()
    return (norms_II - 2 * cosine_II).clamp(min=0).sqrt()
