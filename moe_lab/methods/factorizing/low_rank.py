"""Low-rank matrices of least error, of weights or of outputs over the calibration text.

Of W [O, N] with inputs of the uncentred covariance C = S S^T, the matrix of rank R whose outputs
differ least from W's, min tr((W - V) C (W - V)^T), is the truncated SVD of W S times S^-1 (SVD-LLM,
2403.07378), and the error is the sum of the squared singular values that went. With W S = U s V^T
that is U_R U_R^T W: neither S nor its inverse is needed, and U are the eigenvectors of W C W^T. All
in float64. Letters: E experts, O outputs, N inputs, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor


def damped(covariance_NN: Tensor, damping: float) -> Tensor:
    """C + lambda I, lambda = damping * mean of C's diagonal, and I where C is zero.

    Where inputs do not span the space, W C W^T has directions without error: a little damping lets
    the weights decide there.
    """
    mean = float(covariance_NN.diagonal().mean())
    one_NN = torch.eye(len(covariance_NN), dtype=torch.float64)
    damped_NN: Tensor = covariance_NN + damping * mean * one_NN
    return damped_NN if mean > 0 else one_NN


def output_basis(weight_ON: Tensor, covariance_NN: Tensor | None, rank: int) -> Tensor:
    """U_R [O, R]: W is cut to U_R U_R^T W; None: as for inputs without any order, C = I."""
    product_NO = weight_ON.T if covariance_NN is None else covariance_NN @ weight_ON.T
    return leading(weight_ON @ product_NO, rank)


def each_by_itself(
    weight_EON: Tensor, covariance_ENN: Tensor | None, rank: int
) -> tuple[Tensor, Tensor]:
    """Left factors [E, O, R] and right factors [E, R, N] of every matrix by itself."""
    bases = [
        output_basis(one, None if covariance_ENN is None else covariance_ENN[expert], rank)
        for expert, one in enumerate(weight_EON)
    ]
    left_EOR = torch.stack(bases)
    return left_EOR, left_EOR.mT @ weight_EON


def leading(matrix_OO: Tensor, rank: int) -> Tensor:
    """The eigenvectors [O, R] of a symmetric matrix with the largest eigenvalues, these first.

    The largest entry of each is positive, so that it does not depend on the solver's sign.
    """
    matrix_OO = (matrix_OO + matrix_OO.T) / 2
    _, vector_OO = torch.linalg.eigh(matrix_OO)
    found_OR = vector_OO.flip(1)[:, :rank]
    peak_R = found_OR.abs().argmax(dim=0, keepdim=True)
    signed_OR: Tensor = found_OR * found_OR.gather(0, peak_R).sign()
    return signed_OR


def shared_right(
    weight_EON: Tensor, covariance_NN: Tensor | None, share_E: Tensor | None, rank: int
) -> tuple[Tensor, Tensor]:
    """Left factors [E, O, R] and the one right factor [R, N] of least error of all experts.

    min sum_e share_e tr((W_e - L_e V) C (W_e - L_e V)^T), one C for all: the truncated SVD of the
    experts' W_e S under one another. None: C = I, and the experts count alike.
    """
    if share_E is not None and bool(share_E.any()):
        share_E = share_E / share_E.sum()
        gram_NN = torch.einsum("e,eon,eom->nm", share_E, weight_EON, weight_EON)
    else:
        gram_NN = torch.einsum("eon,eom->nm", weight_EON, weight_EON)
    if covariance_NN is None:
        right_NR = leading(gram_NN, rank)
        return weight_EON @ right_NR, right_NR.T.contiguous()
    root_NN = torch.linalg.cholesky(covariance_NN)
    right_NR = leading(root_NN.T @ gram_NN @ root_NN, rank)
    right_RN = torch.linalg.solve_triangular(root_NN.T, right_NR, upper=True).T
    return weight_EON @ (root_NN @ right_NR), right_RN.contiguous()


def shared_left(
    weight_EON: Tensor, covariance_ENN: Tensor | None, rank: int
) -> tuple[Tensor, Tensor]:
    """The one left factor [O, R] and right factors [E, R, N] of least error of all experts.

    min sum_e tr((W_e - U V_e) C_e (W_e - U V_e)^T), each with its own C_e: exact.
    """
    product_EON = weight_EON if covariance_ENN is None else weight_EON @ covariance_ENN
    left_OR = leading(torch.einsum("eon,epn->op", product_EON, weight_EON), rank)
    return left_OR, left_OR.T @ weight_EON
