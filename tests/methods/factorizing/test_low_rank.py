"""Low ranks of least error: the theorem of SVD-LLM, and optima found by others."""

from __future__ import annotations

import numpy
import pytest
import scipy.linalg
import scipy.optimize
import torch
from torch import Tensor

from moe_lab.methods.factorizing.low_rank import (
    damped,
    each_by_itself,
    leading,
    output_basis,
    shared_left,
    shared_right,
)

E, O, N, R, TOKENS = 4, 6, 8, 3, 40  # noqa: E741


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(seed: int = 1, number: int = TOKENS) -> Tensor:
    """Inputs [T, N] that are far from white."""
    return normal(number, N, seed=seed) @ normal(N, N, seed=9)


def test_the_loss_on_the_text_is_the_sum_of_the_squares_that_went() -> None:
    """SVD-LLM by its own formula: the truncated SVD of W S times S^-1, S by Cholesky (scipy)."""
    weight, x = normal(O, N), tokens()
    root = scipy.linalg.cholesky((x.T @ x).numpy(), lower=True)
    u, s, vt = scipy.linalg.svd(weight.numpy() @ root, full_matrices=False)
    expected = (u[:, :R] * s[:R]) @ vt[:R] @ numpy.linalg.inv(root)
    basis = output_basis(weight, x.T @ x, R)
    found = basis @ (basis.T @ weight)
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-8, atol=1e-8)
    lost = (x @ (weight - found).T).square().sum()
    torch.testing.assert_close(float(lost), float((s[R:] ** 2).sum()), rtol=1e-9, atol=0)
    plain = scipy.linalg.svd(weight.numpy())
    cut = torch.from_numpy((plain[0][:, :R] * plain[1][:R]) @ plain[2][:R])
    assert lost < (x @ (weight - cut).T).square().sum()


def test_without_covariance_it_is_the_plain_svd() -> None:
    weight = normal(O, N)
    u, s, vt = scipy.linalg.svd(weight.numpy())
    basis = output_basis(weight, None, R)
    expected = torch.from_numpy((u[:, :R] * s[:R]) @ vt[:R])
    torch.testing.assert_close(basis @ (basis.T @ weight), expected)


def test_full_rank_is_the_identity_also_where_tokens_are_few() -> None:
    weights, few = normal(E, O, N), torch.stack([x.T @ x for x in (tokens(e, 2) for e in range(E))])
    covariances = torch.stack([damped(one, 1e-6) for one in few])
    for found in (
        each_by_itself(weights, covariances, O),
        shared_right(weights, damped(few.sum(dim=0), 1e-6), None, N),
        shared_left(weights, covariances, O),
    ):
        left, right = found
        torch.testing.assert_close(left @ right, weights, rtol=1e-10, atol=1e-10)


def test_a_covariance_of_nothing_is_the_identity() -> None:
    assert torch.equal(damped(torch.zeros(3, 3).double(), 0.5), torch.eye(3).double())
    two = torch.diag(torch.tensor([1.0, 3.0]).double())
    assert torch.equal(damped(two, 0.5), torch.diag(torch.tensor([2.0, 4.0]).double()))


def test_the_shared_right_factor_is_the_optimum() -> None:
    """Against the truncated SVD of the experts' weighted W S under one another, by numpy."""
    weights, x = normal(E, O, N), tokens()
    share = torch.tensor([1.0, 2.0, 3.0, 4.0]).double()
    root = numpy.linalg.cholesky((x.T @ x).numpy())
    stacked = numpy.concatenate([
        float(share[e] / share.sum()) ** 0.5 * weights[e].numpy() @ root for e in range(E)
    ])  # fmt: skip
    s = numpy.linalg.svd(stacked, compute_uv=False)
    left, right = shared_right(weights, x.T @ x, share, R)
    assert left.shape == (E, O, R) and right.shape == (R, N)
    lost = sum(
        float(share[e] / share.sum() * (x @ (weights[e] - left[e] @ right).T).square().sum())
        for e in range(E)
    )
    assert lost == pytest.approx(float((s[R:] ** 2).sum()), rel=1e-9)


def test_the_shared_left_factor_is_the_optimum_of_many_tries() -> None:
    """Each expert has its own covariance: against scipy's minimiser from several starts."""
    weights = normal(3, 4, 5, seed=3)
    roots = normal(3, 5, 5, seed=4)
    covariances = roots @ roots.mT

    def loss(left: Tensor) -> Tensor:
        basis, _ = torch.linalg.qr(left)  # the best right factor of a basis is its own product
        lost = weights - basis @ (basis.T @ weights)
        return (lost @ covariances * lost).sum()

    def tried(flat: numpy.ndarray) -> tuple[float, numpy.ndarray]:
        left = torch.from_numpy(flat).reshape(4, 2).requires_grad_()
        value = loss(left)
        [gradient] = torch.autograd.grad(value, left)
        return float(value.detach()), gradient.flatten().numpy()

    best = min(
        scipy.optimize.minimize(tried, normal(8, seed=seed).numpy(), jac=True, tol=1e-12).fun
        for seed in range(4)
    )
    left, right = shared_left(weights, covariances, 2)
    lost = weights - left @ right
    assert float((lost @ covariances * lost).sum()) == pytest.approx(best, rel=1e-6)


def test_signs_do_not_hang_on_the_solver() -> None:
    matrix = normal(5, 5)
    found = leading(matrix @ matrix.T, 3)
    assert (found.gather(0, found.abs().argmax(dim=0, keepdim=True)) > 0).all()
    torch.testing.assert_close(found.T @ found, torch.eye(3).double())
