"""The ridge, and the factor in place: against torch's own, over several blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_lab.methods import ridge
from moe_lab.methods.ridge import Ridge, cholesky, factored, half_substituted, mirror, substituted
from moe_lab.types import NotFinite, UserError


@pytest.fixture(params=[3, 8, 1024])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(ridge, "BLOCK", request.param)
    return int(request.param)


def gram(units: int = 17, tokens: int = 40, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(units)
    z_TN = torch.randn(tokens, units, generator=generator, dtype=torch.float64)
    gram_NN = (z_TN.T @ z_TN).to(dtype)
    return gram_NN.tril() + gram_NN.tril(-1).T  # exactly symmetric


def test_lambda_is_a_share_of_the_mean_or_of_the_own_entry() -> None:
    diagonal_N = torch.tensor([1.0, 5.0, 0.0], dtype=torch.float64)
    assert Ridge(0.1).added(diagonal_N).tolist() == pytest.approx([0.2] * 3)
    assert Ridge(0.1, "unit").added(diagonal_N).tolist() == pytest.approx([0.1, 0.5, 2e-7])
    for scale in ("mean", "unit"):  # nothing is known but the prior
        assert Ridge(0.1, scale).added(0 * diagonal_N).tolist() == [1.0] * 3
        assert Ridge(0.1, scale).added(diagonal_N[:0]).tolist() == []


@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf")])
def test_strengths_that_are_none(strength: float) -> None:
    with pytest.raises(UserError, match="strength"):
        Ridge(strength)


def test_scales_that_are_none() -> None:
    with pytest.raises(UserError, match="mean, unit"):
        Ridge(1.0, "median")


def test_the_grid_is_wide_on_both_scales() -> None:
    for scale in ("mean", "unit"):
        strengths = [one.strength for one in ridge.RIDGES if one.scale == scale]
        assert min(strengths) == pytest.approx(1e-6) and max(strengths) == pytest.approx(10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_factor_in_place_and_everything_back(block: int, dtype: torch.dtype) -> None:
    gram_NN = gram(dtype=dtype)
    before_NN, asked = gram_NN.clone(), Ridge(0.01, "unit")
    ridged_NN = before_NN + asked.added(before_NN.diagonal()).diag()
    right_ND = torch.randn(17, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    with factored(gram_NN, asked) as found:
        assert found == asked
        assert torch.equal(gram_NN.triu(1), before_NN.triu(1))
        torch.testing.assert_close(gram_NN.tril(), torch.linalg.cholesky(ridged_NN))
        solution_ND = substituted(gram_NN, right_ND)
        half_ND = half_substituted(gram_NN, right_ND)
    assert torch.equal(gram_NN, before_NN)
    torch.testing.assert_close(solution_ND, torch.linalg.solve(ridged_NN, right_ND))
    torch.testing.assert_close(half_ND.T @ half_ND, right_ND.T @ solution_ND)


def test_back_also_after_an_error(block: int) -> None:
    gram_NN = gram()
    before_NN = gram_NN.clone()
    with pytest.raises(KeyError), factored(gram_NN, Ridge(0.0)):
        raise KeyError
    assert torch.equal(gram_NN, before_NN)


@pytest.mark.parametrize("upper", [True, False])
def test_one_triangle_over_the_other(block: int, upper: bool) -> None:
    matrix_NN = torch.arange(121.0).view(11, 11)
    part_NN = matrix_NN.triu() if upper else matrix_NN.tril()
    expected_NN = part_NN + part_NN.T - matrix_NN.diagonal().diag()
    mirror(matrix_NN, upper=upper)
    assert torch.equal(matrix_NN, expected_NN)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_ridge_grows_until_there_is_a_factor(block: int, dtype: torch.dtype) -> None:
    gram_NN = gram(tokens=4, dtype=dtype)
    gram_NN -= 1e-3 * gram_NN.diagonal().mean() * torch.eye(17, dtype=dtype)  # as rounding might
    before_NN = gram_NN.clone()
    factor_NN, found = cholesky(gram_NN, Ridge(0.0))
    assert 1e-3 < found.strength <= 1.01e-2
    assert torch.equal(gram_NN, before_NN)
    expected_NN = gram_NN + found.added(gram_NN.diagonal()).diag()
    torch.testing.assert_close(factor_NN @ factor_NN.T, expected_NN)


def test_no_ridge_makes_a_factor_of_what_is_not_finite() -> None:
    gram_NN = gram()
    gram_NN[3, 2] = gram_NN[2, 3] = torch.nan
    with pytest.raises(NotFinite, match="not finite"):
        cholesky(gram_NN, Ridge(1.0))
