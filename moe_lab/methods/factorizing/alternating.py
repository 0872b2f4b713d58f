"""Alternating least squares: what decompositions of the experts' tensor [E, O, N] share."""

from __future__ import annotations

import torch
from torch import Tensor

HELD = 1e-10  # of the mean diagonal: how strongly a factor is held where it was


def solved_factor(gram_RR: Tensor, right_XR: Tensor, old_XR: Tensor) -> Tensor:
    """The factor X [X, R] with X G nearest to `right`, held a little at what it was.

    min ||T - X K^T||^2 + lambda ||X - X_old||^2, G = K^T K, right = T K: the error never grows, and
    a singular G has a solution.
    """
    added = HELD * float(gram_RR.diagonal().mean())
    held_RR = gram_RR + max(added, 1e-300) * torch.eye(len(gram_RR), dtype=gram_RR.dtype)
    factor_RR, failed = torch.linalg.cholesky_ex(held_RR)
    missing_RX = (right_XR - old_XR @ gram_RR).T
    if int(failed):
        change_RX = torch.linalg.pinv(held_RR, hermitian=True) @ missing_RX
    else:
        change_RX = torch.cholesky_solve(missing_RX, factor_RR)
    found_XR: Tensor = old_XR + change_RX.T
    return found_XR
