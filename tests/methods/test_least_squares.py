"""Columns by least squares: against scipy on the rows themselves, and odd tokens and units."""

from __future__ import annotations

import pytest
import scipy.linalg
import torch
from torch import Tensor

from moe_lab.methods import least_squares
from moe_lab.methods.least_squares import Fit, NormalEquations, TokenRows, fitted, solved
from moe_lab.methods.ridge import RIDGES, Ridge
from moe_lab.types import NotFinite, UserError

UNITS, SIZE = 9, 4


class Problem:
    """Tokens of units that have much to do with each other, what is wanted of them, and a prior."""

    def __init__(self, units: int = UNITS, tokens: int = 60, noise: float = 0.3, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)
        mixed_NN = self.normal(units, units) / 3 + torch.eye(units)
        z_TN = self.normal(tokens, units) @ mixed_NN
        self.true_ND = self.normal(units, SIZE)
        y_TD = z_TN @ self.true_ND + noise * self.normal(tokens, SIZE)
        self.rows = TokenRows(
            z_TN, y_TD, torch.rand(tokens, generator=self.generator).double() + 0.1
        )
        self.prior_ND = self.true_ND + 0.5 * self.normal(units, SIZE)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def part(self, start: int, stop: int | None = None) -> TokenRows:
        return TokenRows(*(values[start:stop] for values in self.rows))

    def fit(self, **options: object) -> Fit:
        """Fitted on two thirds, judged on the rest."""
        first = len(self.rows.z_TN) * 2 // 3
        equations = sums(self.part(0, first))
        return fitted(equations, lambda: [self.part(first)], self.prior_ND, **options)  # type: ignore[arg-type]


def sums(rows: TokenRows, parts: int = 1) -> NormalEquations:
    equations = NormalEquations(rows.z_TN.shape[1], rows.y_TD.shape[1])
    for each in zip(*(values.tensor_split(parts) for values in rows), strict=True):
        equations.add(TokenRows(*each))
    return equations


def by_scipy(rows: TokenRows, prior_ND: Tensor, ridge: Ridge) -> Tensor:
    """The same by orthogonal factors of the rows: weighted, with one more for each ridge."""
    root_T1 = rows.weight_T.sqrt()[:, None]
    z_TN, y_TD = rows.z_TN * root_T1, rows.y_TD * root_T1
    pull_NN = ridge.added(z_TN.square().sum(dim=0)).sqrt().diag()
    left, right = torch.cat([z_TN, pull_NN]), torch.cat([y_TD, pull_NN @ prior_ND])
    return torch.from_numpy(scipy.linalg.lstsq(left.numpy(), right.numpy())[0])


def relative(rows: TokenRows, columns_ND: Tensor) -> float:
    off_T = (rows.z_TN @ columns_ND - rows.y_TD).square().sum(dim=1)
    return float(rows.weight_T @ off_T / (rows.weight_T @ rows.y_TD.square().sum(dim=1)))


@pytest.fixture(params=[1024, 4])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("least_squares", "ridge"):
        monkeypatch.setattr(f"moe_lab.methods.{module}.BLOCK", request.param)


def test_sums_are_those_of_all_tokens(block: None) -> None:
    rows = Problem().rows
    equations = sums(rows, parts=7)
    weighted_TN = rows.z_TN * rows.weight_T[:, None]
    torch.testing.assert_close(equations.gram_NN, weighted_TN.T @ rows.z_TN)
    torch.testing.assert_close(equations.cross_ND, weighted_TN.T @ rows.y_TD)
    assert equations.square == pytest.approx(float(rows.weight_T @ rows.y_TD.square().sum(dim=1)))
    assert equations.num_rows == 60


def test_sums_of_some_units(block: None) -> None:
    rows = Problem().rows
    units_K = torch.tensor([5, 0, 7])
    part, direct = sums(rows).of(units_K), sums(TokenRows(rows.z_TN[:, units_K], *rows[1:]))
    torch.testing.assert_close(part.gram_NN, direct.gram_NN)
    torch.testing.assert_close(part.cross_ND, direct.cross_ND)
    assert (part.square, part.num_rows) == (direct.square, direct.num_rows)
    columns_KD = torch.randn(3, SIZE).double()
    assert part.error(columns_KD) == pytest.approx(direct.error(columns_KD))


def test_error_is_that_of_the_tokens(block: None) -> None:
    problem = Problem()
    for columns_ND in (problem.prior_ND, problem.true_ND, 0 * problem.prior_ND):
        expected = relative(problem.rows, columns_ND)
        assert sums(problem.rows).error(columns_ND) == pytest.approx(expected)


@pytest.mark.parametrize("ridge", [RIDGES[3], RIDGES[-1], Ridge(1e-9), Ridge(0.3, "unit")])
def test_columns_are_those_of_scipy(ridge: Ridge, block: None) -> None:
    problem = Problem()
    found_ND = solved(sums(problem.rows), problem.prior_ND, ridge)
    expected_ND = by_scipy(problem.rows, problem.prior_ND, ridge)
    torch.testing.assert_close(found_ND, expected_ND, rtol=1e-6, atol=1e-8)


def test_enough_units_give_a_target_that_they_can_give_exactly() -> None:
    problem = Problem(noise=0.0)
    fit = problem.fit(ridges=[Ridge(1e-10), Ridge(1.0)])
    torch.testing.assert_close(fit.columns_ND, problem.true_ND, rtol=1e-6, atol=1e-6)
    assert fit.error < 1e-12 and fit.held_error < 1e-12
    assert fit.ridge == Ridge(1e-10)


@pytest.mark.parametrize("scale", ["mean", "unit"])
def test_a_large_ridge_leaves_the_prior(scale: str) -> None:
    problem = Problem()
    found_ND = solved(sums(problem.rows), problem.prior_ND, Ridge(1e9, scale))
    torch.testing.assert_close(found_ND, problem.prior_ND, rtol=1e-6, atol=1e-6)


def test_the_scale_of_a_unit_does_not_matter_to_a_ridge_of_its_own_scale() -> None:
    problem = Problem()
    scale_N = torch.tensor([0.1, 3, 1, 1, 30, 1, 1, 0.3, 1]).double()
    scaled = TokenRows(problem.rows.z_TN * scale_N, *problem.rows[1:])
    one_ND = solved(sums(problem.rows), problem.prior_ND, Ridge(0.1, "unit"))
    two_ND = solved(sums(scaled), problem.prior_ND / scale_N[:, None], Ridge(0.1, "unit"))
    torch.testing.assert_close(two_ND * scale_N[:, None], one_ND)
    mean_ND = solved(sums(problem.rows), problem.prior_ND, Ridge(0.1))
    other_ND = solved(sums(scaled), problem.prior_ND / scale_N[:, None], Ridge(0.1))
    assert not torch.allclose(other_ND * scale_N[:, None], mean_ND, rtol=1e-2)


@pytest.mark.parametrize("seed", range(4))
def test_the_chosen_ridge_is_the_best_of_the_grid_on_the_held_rows(seed: int) -> None:
    problem = Problem(tokens=24, noise=(0.1, 1.0, 3.0, 10.0)[seed], seed=seed)
    fit, first, held = problem.fit(), problem.part(0, 16), problem.part(16)
    errors = [relative(held, by_scipy(first, problem.prior_ND, ridge)) for ridge in RIDGES]
    best = min(range(len(RIDGES)), key=errors.__getitem__)
    assert fit.ridge == RIDGES[best]
    assert fit.held_error == pytest.approx(errors[best], rel=1e-6)
    assert fit.prior_error == pytest.approx(relative(held, problem.prior_ND))
    expected_ND = by_scipy(problem.rows, problem.prior_ND, RIDGES[best])
    torch.testing.assert_close(fit.columns_ND, expected_ND, rtol=1e-6, atol=1e-8)
    assert fit.error == pytest.approx(relative(problem.rows, expected_ND), rel=1e-6)


def test_the_best_ridge_is_not_always_the_same() -> None:
    strengths = {Problem(tokens=24, noise=noise).fit().ridge.strength for noise in (0.01, 10.0)}
    assert len(strengths) == 2


def test_held_rows_are_in_the_sums_afterwards() -> None:
    problem = Problem()
    equations = sums(problem.part(0, 40))
    fitted(equations, lambda: [problem.part(40, 50), problem.part(50)], problem.prior_ND)
    torch.testing.assert_close(equations.gram_NN, sums(problem.rows).gram_NN)
    assert equations.num_rows == 60


def test_a_wide_state_is_judged_in_a_sketch_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(units=20, tokens=90)
    wide_DD = problem.normal(SIZE, 700)
    noise_TD = 2 * problem.normal(90, 700)
    problem.rows = problem.rows._replace(y_TD=problem.rows.y_TD @ wide_DD + noise_TD)
    problem.prior_ND = problem.prior_ND @ wide_DD
    sketched = problem.fit()
    monkeypatch.setattr(least_squares, "SKETCH", 700)
    whole = problem.fit()
    assert sketched.ridge == whole.ridge
    assert sketched.held_error != whole.held_error
    assert sketched.held_error == pytest.approx(whole.held_error, rel=0.1)
    assert sketched.prior_error == pytest.approx(whole.prior_error, rel=0.1)
    torch.testing.assert_close(sketched.columns_ND, whole.columns_ND)


def odd(kind: str) -> Problem:
    problem = Problem(units=20, tokens=90)
    z_TN, y_TD, weight_T = problem.rows
    if kind == "duplicated units":
        z_TN[:, 10:] = z_TN[:, :10]
    if kind == "fewer tokens than units":
        problem.rows = problem.part(0, 12)
    if kind == "one unit is always zero":
        z_TN[:, 3] = 0
    if kind == "all is zero":
        z_TN.zero_()
    if "one huge token" in kind:
        z_TN[7] *= 1e4
        y_TD[7] = z_TN[7] @ problem.true_ND
    if kind == "one huge token, weighted":
        weight_T[7] = 1e-8
    return problem


KINDS = [
    "duplicated units", "fewer tokens than units", "one unit is always zero", "all is zero",
    "one huge token", "one huge token, weighted",
]  # fmt: skip


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_odd_tokens_and_units(kind: str, single: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if single:
        monkeypatch.setattr(least_squares, "LARGE", 2)
    problem = odd(kind)
    problem.rows = TokenRows(*(part.float() for part in problem.rows)) if single else problem.rows
    fit = problem.fit()
    assert fit.columns_ND.dtype == (torch.float32 if single else torch.float64)
    assert bool(fit.columns_ND.isfinite().all())
    assert fit.held_error <= fit.prior_error + 1e-6
    assert fit.error <= sums(problem.rows).error(problem.prior_ND) + 1e-6
    if kind == "one unit is always zero":
        torch.testing.assert_close(fit.columns_ND[3].double(), problem.prior_ND[3])
    if kind == "all is zero":
        torch.testing.assert_close(fit.columns_ND.double(), problem.prior_ND)
    if kind == "one huge token, weighted":  # then it is a token like others
        assert relative(problem.part(8), fit.columns_ND.to(problem.rows.z_TN.dtype)) < 0.05


@pytest.mark.parametrize("single", [True, False])
def test_a_ridge_too_small_is_made_larger_and_said(
    single: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if single:
        monkeypatch.setattr(least_squares, "LARGE", 2)
    problem = odd("duplicated units")
    fit = problem.fit(ridges=[Ridge(0.0)])
    assert 0 < fit.ridge.strength <= (1e-5 if single else 1e-9)
    expected_ND = by_scipy(problem.rows, problem.prior_ND, fit.ridge)
    both_ND = fit.columns_ND.double().view(2, 10, SIZE).sum(dim=0)  # units n and 10 + n are one
    close = 1e-3 if single else 1e-6
    expected_ND = expected_ND.view(2, 10, SIZE).sum(dim=0)
    torch.testing.assert_close(both_ND, expected_ND, rtol=close, atol=close)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", ["z_TN", "y_TD", "weight_T"])
def test_values_that_are_none(which: str, value: float) -> None:
    rows = Problem().rows
    getattr(rows, which)[5] = value
    named = {"z_TN": "hidden unit", "y_TD": "target", "weight_T": "weight"}[which]
    equations = NormalEquations(UNITS, SIZE)
    with pytest.raises(NotFinite, match=named):
        equations.add(rows)
    assert not equations.gram_NN.any() and equations.num_rows == 0
    good = sums(Problem().rows)
    with pytest.raises(NotFinite, match="held-out"):
        fitted(good, lambda: [rows], Problem().prior_ND)


def test_values_whose_squares_are_none() -> None:
    rows = TokenRows(*(part.float() for part in Problem().rows))
    rows.z_TN[5] = 1e30
    with pytest.raises(NotFinite, match="too large"):
        NormalEquations(UNITS, SIZE).add(rows)


def test_negative_weights_are_none() -> None:
    rows = Problem().rows
    rows.weight_T[5] = -1
    with pytest.raises(NotFinite, match="weight"):
        NormalEquations(UNITS, SIZE).add(rows)


def test_a_prior_that_is_none() -> None:
    problem = Problem()
    problem.prior_ND[2, 1] = torch.nan
    with pytest.raises(NotFinite, match="down projection"):
        problem.fit()


def test_nothing_to_choose_with() -> None:
    problem = Problem()
    with pytest.raises(UserError, match="held-out"):
        fitted(sums(problem.rows), list, problem.prior_ND)
    with pytest.raises(UserError, match="ridge"):
        problem.fit(ridges=[])


def test_single_precision_of_a_large_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """600 units with scales over three decades, 3,000 tokens: sums to 1e-5 of the diagonal's
    roots, the error of the fit to 1 %."""
    problem = Problem(units=600, tokens=3000, noise=30.0)
    scale_N = 10 ** (3 * torch.rand(600, generator=problem.generator).double() - 1.5)
    problem.rows = problem.rows._replace(z_TN=problem.rows.z_TN * scale_N)
    problem.prior_ND /= scale_N[:, None]
    equations, double = sums(problem.rows), problem.fit()
    monkeypatch.setattr(least_squares, "LARGE", 2)
    problem.rows = TokenRows(*(part.float() for part in problem.rows))
    single_NN = sums(problem.rows, parts=9).gram_NN
    root_N = equations.gram_NN.diagonal().sqrt()
    off_NN = (single_NN.double() - equations.gram_NN) / root_N / root_N[:, None]
    assert single_NN.dtype == torch.float32 and float(off_NN.abs().max()) < 1e-5
    single = problem.fit()
    assert single.held_error == pytest.approx(double.held_error, rel=0.01)
    assert single.error == pytest.approx(double.error, rel=0.01)
