"""One factor by least squares, held where it was."""

from __future__ import annotations

import torch

from moe_lab.methods.factorizing.alternating import solved_factor


def test_it_is_the_least_squares_solution() -> None:
    torch.manual_seed(0)
    design, wanted = torch.randn(20, 4).double(), torch.randn(3, 20).double()
    expected = torch.linalg.lstsq(design, wanted.T).solution.T
    found = solved_factor(design.T @ design, wanted @ design, torch.zeros(3, 4).double())
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


def test_where_nothing_decides_the_factor_stays_as_it_was() -> None:
    design = torch.zeros(5, 2).double()
    design[:, 0] = 1.0  # the second column says nothing
    old = torch.tensor([[3.0, 7.0]]).double()
    found = solved_factor(design.T @ design, 2.0 * torch.ones(1, 5).double() @ design, old)
    torch.testing.assert_close(found, torch.tensor([[2.0, 7.0]]).double())
    nothing = torch.zeros(2, 2).double()
    assert torch.equal(solved_factor(nothing, torch.zeros(1, 2).double(), old), old)
