"""Second-order removal: against trying all units with a solver of its own, and odd sums."""

from __future__ import annotations

import pytest
import scipy.linalg
import torch
from torch import Tensor

from moe_lab.methods import second_order
from moe_lab.methods.second_order import hessian, in_turn, one_by_one, refitted, rising


class Problem:
    """Hidden units of 40 tokens that have much to do with each other, and their columns."""

    def __init__(self, units: int = 9, tokens: int = 40, outputs: int = 4, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.z_TN = torch.randn(tokens, units, generator=generator, dtype=torch.float64)
        mixed = torch.randn(units, units, generator=generator, dtype=torch.float64)
        self.z_TN = self.z_TN @ (mixed / 3 + torch.eye(units))
        self.columns_ND = torch.randn(units, outputs, generator=generator, dtype=torch.float64)

    @property
    def gram(self) -> Tensor:
        return self.z_TN.T @ self.z_TN

    def solved(self, kept: list[int], ridge: float) -> tuple[Tensor, float]:
        """The least-squares columns of what stays, by scipy, and the loss with them."""
        pull = (ridge * self.gram.diagonal().mean()).sqrt() * torch.eye(len(self.gram)).double()
        rows_MN = torch.cat([self.z_TN, pull])
        target_MD = rows_MN @ self.columns_ND
        found = scipy.linalg.lstsq(rows_MN[:, kept].numpy(), target_MD.numpy())[0]
        new_ND = torch.zeros_like(self.columns_ND)
        new_ND[kept] = torch.from_numpy(found)
        return new_ND, float((rows_MN @ new_ND - target_MD).square().sum())


def kept_of(kept: list[int], number: int) -> Tensor:
    mask = torch.zeros(number, dtype=torch.bool)
    mask[kept] = True
    return mask


@pytest.mark.parametrize("ridge", [0.0, 0.01, 3.0])
def test_each_removal_is_the_best_of_all(ridge: float) -> None:
    problem, kept, loss = Problem(), list(range(9)), 0.0
    found = one_by_one(problem.gram, problem.columns_ND, ridge)
    for unit, cost in zip(found.unit_N.tolist(), found.cost_N.tolist(), strict=True):
        losses = {q: problem.solved([k for k in kept if k != q], ridge)[1] for q in kept}
        assert unit == min(losses, key=losses.__getitem__)
        kept.remove(unit)
        loss += cost
        assert loss == pytest.approx(losses[unit], rel=1e-8 if ridge else 1e-6)
        expected, _ = problem.solved(kept, ridge)
        new_ND = refitted(problem.gram, problem.columns_ND, kept_of(kept, 9), ridge)
        torch.testing.assert_close(new_ND, expected, rtol=1e-7, atol=1e-7)


def slow(gram_NN: Tensor, columns_ND: Tensor, ridge: float, each: int = 0) -> list[int]:
    """OBS as it is written: the inverse computed anew for what is left, the columns changed.

    each: the units of an expert where one of each goes in a round.
    """
    h_NN, left, order = hessian(gram_NN, ridge)[0], list(range(len(gram_NN))), []
    w_DN, done = columns_ND.T.clone(), set()
    while left:
        p_NN = torch.linalg.inv(h_NN[left][:, left])
        costs = (w_DN[:, left].square().sum(dim=0) / p_NN.diagonal()).tolist()
        if {unit // each for unit in left if each} <= done:
            done = set()
        places = [q for q, unit in enumerate(left) if not each or unit // each not in done]
        q = min(places, key=costs.__getitem__)
        w_DN[:, left] -= w_DN[:, left[q], None] * p_NN[q] / p_NN[q, q]
        done |= {left[q] // each} if each else set()
        order.append(left.pop(q))
    return order


@pytest.mark.parametrize("at_once", [1, 7, 64])
def test_removals_between_updates_change_nothing(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem(units=100, tokens=150, seed=1)
    monkeypatch.setattr(second_order, "AT_ONCE", at_once)
    found = one_by_one(problem.gram, problem.columns_ND, 0.01)
    assert found.unit_N.tolist() == slow(problem.gram, problem.columns_ND, 0.01)


def test_in_rounds_all_experts_lose_the_same_number() -> None:
    problem = Problem(units=80, tokens=200, seed=2)
    expert_N = torch.arange(80) // 20
    found = one_by_one(problem.gram, problem.columns_ND, 0.01, expert_N)
    assert sorted(found.unit_N.tolist()) == list(range(80))
    rounds = expert_N[found.unit_N].view(20, 4).sort(dim=1).values
    assert torch.equal(rounds, torch.arange(4).expand(20, 4))
    assert found.unit_N.tolist() == slow(problem.gram, problem.columns_ND, 0.01, each=20)


def test_units_in_another_order_go_in_that_order() -> None:
    problem = Problem(units=70, tokens=90, seed=3)
    order_N = torch.randperm(70, generator=torch.Generator().manual_seed(0))
    found = one_by_one(problem.gram, problem.columns_ND, 0.01)
    moved = one_by_one(problem.gram[order_N][:, order_N], problem.columns_ND[order_N], 0.01)
    assert torch.equal(order_N[moved.unit_N], found.unit_N)


def test_experts_that_share_no_token_are_problems_of_their_own() -> None:
    parts = [Problem(units=8, seed=seed) for seed in (4, 5, 6)]
    gram = torch.block_diag(*(part.gram for part in parts))
    columns_ND = torch.cat([part.columns_ND for part in parts])
    each = [one_by_one(part.gram, part.columns_ND, 0.0) for part in parts]
    for evenly in (True, False):
        expert_N = torch.arange(24) // 8 if evenly else None
        joint = one_by_one(gram, columns_ND, 0.0, expert_N)
        expert, unit, cost = in_turn(each, evenly)
        torch.testing.assert_close(joint.cost_N, cost, rtol=1e-6, atol=1e-9)
        assert torch.equal(joint.unit_N, expert * 8 + unit)


def test_removing_nothing_is_the_identity() -> None:
    problem = Problem()
    every = torch.ones(9, dtype=torch.bool)
    assert torch.equal(refitted(problem.gram, problem.columns_ND, every, 0.01), problem.columns_ND)


def test_a_large_ridge_leaves_what_stays_as_it_is() -> None:
    problem, kept = Problem(), kept_of([0, 2, 3, 7], 9)
    new_ND = refitted(problem.gram, problem.columns_ND, kept, 1e9)
    torch.testing.assert_close(new_ND[kept], problem.columns_ND[kept], rtol=1e-6, atol=1e-6)
    assert not new_ND[~kept].any()


def test_one_of_two_that_do_the_same_goes_first_and_the_other_does_its_work() -> None:
    problem = Problem()
    problem.z_TN[:, 5] = problem.z_TN[:, 2]
    found = one_by_one(problem.gram, problem.columns_ND, 0.0)
    assert int(found.unit_N[0]) in (2, 5)
    assert found.cost_N[0] < 1e-6 * found.cost_N[1]
    stays = 7 - int(found.unit_N[0])
    kept = torch.arange(9) != found.unit_N[0]
    new_ND = refitted(problem.gram, problem.columns_ND, kept, 0.0)
    both = problem.columns_ND[2] + problem.columns_ND[5]
    torch.testing.assert_close(new_ND[stays], both, rtol=1e-5, atol=1e-5)


def odd(kind: str) -> Problem:
    problem = Problem(units=90, tokens=200, seed=7)
    if kind == "fewer tokens than units":
        problem.z_TN = problem.z_TN[:5]
    if kind == "no tokens":
        problem.z_TN = problem.z_TN[:0]
    if kind == "one huge token":
        problem.z_TN[3] *= 1e4
    if kind == "dead units":
        problem.z_TN[:, ::2] = 0
    if kind == "all the same":
        problem.z_TN = problem.z_TN[:, :1].expand(-1, 90).clone()
    return problem


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize(
    "kind",
    ["fewer tokens than units", "no tokens", "one huge token", "dead units", "all the same"],
)
def test_odd_sums_give_finite_numbers(kind: str, single: bool, ridge: float) -> None:
    problem = odd(kind)
    gram = problem.gram.float() if single else problem.gram
    found = one_by_one(gram, problem.columns_ND, ridge)
    assert sorted(found.unit_N.tolist()) == list(range(90))
    assert bool((found.cost_N >= 0).all()) and bool(found.cost_N.isfinite().all())
    kept = torch.ones(90, dtype=torch.bool)
    kept[found.unit_N[:45]] = False
    new_ND = refitted(gram, problem.columns_ND, kept, ridge)
    assert bool(new_ND.isfinite().all())
    assert not new_ND[~kept].any()
    target = problem.z_TN @ problem.columns_ND
    error = (problem.z_TN @ new_ND - target).square().sum()
    sliced = torch.where(kept[:, None], problem.columns_ND, 0.0)
    worse = (problem.z_TN @ sliced - target).square().sum()
    assert float(error) <= float(worse) * (1 + 1e-6)
    if kind == "no tokens":  # all that is known is the columns: the smallest go
        smallest = problem.columns_ND.square().sum(dim=1).argsort()
        assert torch.equal(found.unit_N, smallest)
        assert torch.equal(new_ND, sliced)
    if kind == "dead units":
        assert not kept[::2].any()


def test_scores_rise_strictly() -> None:
    cost_N = torch.tensor([0.0, 0.0, 1.0, 0.0, 2.0], dtype=torch.float64)
    score_N = rising(cost_N, 4.0)
    assert bool((score_N.diff() > 0).all())
    torch.testing.assert_close(score_N, torch.tensor([0, 0, 0.25, 0.25, 0.75]).double())
    assert rising(cost_N, 0.0)[-1] == 3.0
