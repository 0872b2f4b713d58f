"""Forward selection: against a fit for every candidate at every step, with and without groups."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe_lab.methods import least_squares
from moe_lab.methods.forward_selection import forward_selection
from moe_lab.methods.least_squares import NormalEquations, TokenRows
from moe_lab.methods.ridge import Ridge
from moe_lab.types import UserError


def equations(
    units: int = 12, tokens: int = 50, seed: int = 0, **changes: Tensor
) -> NormalEquations:
    """Units with scales over a decade that have much to do with each other; some are wanted."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    z_TN = normal(tokens, units) @ (normal(units, units) / 3 + torch.eye(units))
    z_TN = z_TN * 10 ** torch.rand(units, generator=generator).double()
    y_TD = z_TN @ (normal(units, 3) * (normal(units, 1) > 0)) + 3 * normal(tokens, 3)
    found = NormalEquations(units, 3)
    copied_N = changes.get("copied_N", torch.arange(units))
    found.add(TokenRows(z_TN[:, copied_N], y_TD, torch.rand(tokens, generator=generator).double()))
    return found


def least_error(sums: NormalEquations, units: list[int], ridge: Ridge) -> float:
    """The relative ridge-regularised error with these units, fitted anew."""
    added_N = ridge.added(sums.gram_NN.diagonal())[units]
    h_KK = sums.gram_NN[units][:, units] + added_N.diag()
    cross_KD = sums.cross_ND[units]
    explained = (cross_KD * torch.linalg.solve(h_KK, cross_KD)).sum()
    return float(1 - explained / sums.square)


def brute_force(
    sums: NormalEquations, number: int, ridge: Ridge, members: list[list[int]], start: list[int]
) -> tuple[list[int], list[float]]:
    """Every candidate of every step solved for."""
    left, chosen, errors = list(range(len(members))), list(start), []
    for _ in range(number):
        each = {one: least_error(sums, chosen + members[one], ridge) for one in left}
        best = min(left, key=each.__getitem__)
        left.remove(best)
        chosen += members[best]
        errors.append(each[best])
    return chosen[len(start) :], errors


RIDGES = [Ridge(1e-8), Ridge(0.1), Ridge(0.01, "unit"), Ridge(3.0, "unit")]


@pytest.mark.parametrize("start", [[], [7, 2]])
@pytest.mark.parametrize("ridge", RIDGES)
@pytest.mark.parametrize("seed", range(3))
def test_each_unit_is_the_best_of_all(ridge: Ridge, seed: int, start: list[int]) -> None:
    sums = equations(seed=seed)
    members = [[unit] for unit in range(12) if unit not in start]
    units, errors = brute_force(sums, len(members), ridge, members, start)
    found = forward_selection(sums, len(members), ridge, start_K=torch.tensor(start).long())
    assert found.units_K.tolist() == units
    assert found.errors == pytest.approx(errors, rel=1e-6)


@pytest.mark.parametrize("start", [[], [7, 2]])
@pytest.mark.parametrize("ridge", RIDGES)
@pytest.mark.parametrize("seed", range(3))
def test_each_group_is_the_best_of_all(ridge: Ridge, seed: int, start: list[int]) -> None:
    sums, group_N = equations(seed=seed), torch.tensor([3, 3, 0, 5, 0, 5, 5, 1, 1, 3, 2, 2])
    inside = [unit for unit in range(12) if unit not in start]
    members = [
        [unit for unit in inside if int(group_N[unit]) == label] for label in (0, 1, 2, 3, 5)
    ]
    units, errors = brute_force(sums, 4, ridge, members, start)
    found = forward_selection(sums, 4, ridge, group_N, torch.tensor(start).long())
    assert found.units_K.tolist() == units
    assert found.errors == pytest.approx(errors, rel=1e-6)


def test_groups_of_one_are_units() -> None:
    sums = equations()
    units = forward_selection(sums, 8, Ridge(0.01))
    groups = forward_selection(sums, 8, Ridge(0.01), torch.arange(12))
    assert torch.equal(units.units_K, groups.units_K)
    assert units.errors == pytest.approx(groups.errors)


def test_errors_are_those_of_the_fit_where_the_ridge_is_small() -> None:
    sums = equations()
    found = forward_selection(sums, 5, Ridge(1e-10))
    part = sums.of(found.units_K)
    columns_KD = least_squares.solved(part, torch.zeros(5, 3), Ridge(1e-10))
    assert found.errors[-1] == pytest.approx(part.error(columns_KD))
    assert found.errors == sorted(found.errors, reverse=True)


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("groups", [True, False])
def test_a_copy_is_not_chosen_while_others_say_something(
    single: bool, groups: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if single:
        monkeypatch.setattr(least_squares, "LARGE", 2)
    copied_N = torch.arange(24) % 12  # each unit twice
    sums = equations(24, 200, copied_N=copied_N)
    group_N = torch.arange(24) // 2 if groups else None
    found = forward_selection(sums, 6 if groups else 12, Ridge(1e-6), group_N)
    assert sorted((found.units_K % 12).tolist()) == list(range(12))
    rest = forward_selection(sums, 12 if groups else 24, Ridge(1e-6), group_N)
    assert sorted(rest.units_K.tolist()) == list(range(24))  # and all of them where all are asked
    assert rest.errors[-1] == pytest.approx(found.errors[-1], rel=1e-3)


def fewer_tokens(sums: NormalEquations) -> NormalEquations:
    return equations(60, 5)


def dead(sums: NormalEquations) -> NormalEquations:
    sums.gram_NN[:5] = sums.gram_NN[:, :5] = sums.cross_ND[:5] = 0
    return sums


def nothing(sums: NormalEquations) -> NormalEquations:
    return NormalEquations(60, 3)


@pytest.mark.parametrize("groups", [True, False])
@pytest.mark.parametrize("change", [fewer_tokens, dead, nothing])
@pytest.mark.parametrize("strength", [0.0, 1e-3])
def test_odd_sums(
    change: Callable[[NormalEquations], NormalEquations], strength: float, groups: bool
) -> None:
    sums = change(equations(60, 200))
    group_N = torch.arange(60) // 5 if groups else None
    found = forward_selection(sums, 12 if groups else 60, Ridge(strength), group_N)
    assert sorted(found.units_K.tolist()) == list(range(60))
    assert all(0 <= error <= 1 for error in found.errors)
    assert found.errors == sorted(found.errors, reverse=True)
    if change is dead:
        assert sorted(found.units_K[-5:].tolist()) == list(range(5))


def test_one_huge_token_leaves_finite_errors() -> None:
    generator = torch.Generator().manual_seed(3)
    z_TN = torch.randn(80, 20, generator=generator)
    z_TN[5] *= 1e4
    sums = NormalEquations(20, 3)
    sums.add(TokenRows(z_TN, torch.randn(80, 3, generator=generator), torch.ones(80)))
    found = forward_selection(sums, 20, Ridge(0.0))
    assert sorted(found.units_K.tolist()) == list(range(20))
    assert all(0 <= error <= 1 for error in found.errors)


@pytest.mark.parametrize("number", [-1, 13])
def test_more_units_than_there_are(number: int) -> None:
    with pytest.raises(UserError, match="there are 12"):
        forward_selection(equations(), number, Ridge(0.1))


def test_more_groups_than_there_are() -> None:
    with pytest.raises(UserError, match="there are 3"):
        forward_selection(equations(), 4, Ridge(0.1), torch.arange(12) // 4)


@pytest.mark.parametrize("group_N", [None, torch.arange(12) // 3])
def test_the_sums_stay_as_they_are(group_N: Tensor | None) -> None:
    sums = equations()
    before = sums.gram_NN.clone(), sums.cross_ND.clone()
    forward_selection(sums, 3, Ridge(0.1), group_N, torch.tensor([4]))
    assert torch.equal(sums.gram_NN, before[0]) and torch.equal(sums.cross_ND, before[1])


def test_no_unit_is_a_choice() -> None:
    for group_N in (None, torch.arange(12)):
        found = forward_selection(equations(), 0, Ridge(0.1), group_N)
        assert found.units_K.tolist() == [] and found.errors == []
