"""Matrices in factors, against their formulas written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_lab.models.factors import Factors, factors_of, num_factor_parameters
from moe_lab.types import UserError

SHAPE = E, O, N = 5, 6, 7  # noqa: E741  # experts, outputs, inputs
SPECS = {
    "whole": {"kind": "whole"},
    "each its own": {"kind": "low_rank", "rank": 3},
    "right shared": {"kind": "low_rank", "rank": 3, "shared": "right"},
    "left shared": {"kind": "low_rank", "rank": 3, "shared": "left"},
    "with a base": {"kind": "low_rank", "rank": 2, "shared": None, "base": N},
    "base, right shared": {"kind": "low_rank", "rank": 2, "shared": "right", "base": N},
    "base, left shared": {"kind": "low_rank", "rank": 2, "shared": "left", "base": N},
    "base with some columns": {"kind": "low_rank", "rank": 2, "shared": None, "base": 4},
    "silu": {"kind": "mixed_bases", "rank": 4, "bases": 3, "activation": "silu"},
    "tanh": {"kind": "mixed_bases", "rank": 4, "bases": 3, "activation": "tanh"},
    "canonical": {"kind": "canonical", "rank": 8},
    "ring": {"kind": "ring", "ranks": [2, 3, 4]},
}
COUNTS = {
    "whole": E * O * N,
    "each its own": E * 3 * (O + N),
    "right shared": E * 3 * O + 3 * N,
    "left shared": E * 3 * N + 3 * O,
    "with a base": E * 2 * (O + N) + O * N,
    "base, right shared": E * 2 * O + 2 * N + O * N,
    "base, left shared": E * 2 * N + 2 * O + O * N,
    "base with some columns": E * 2 * (O + N) + O * 4,
    "silu": E * O * 4 + 3 * 4 * N + E * 3,
    "tanh": E * O * 4 + 3 * 4 * N + E * 3,
    "canonical": 8 * (E + O + N),
    "ring": 2 * E * 3 + 3 * N * 4 + 4 * O * 2,
}
PER_EXPERT = {  # of the parameters, those that a token with 2 of 5 experts uses two fifths of
    "whole": E * O * N,
    "each its own": E * 3 * (O + N),
    "right shared": E * 3 * O,
    "left shared": E * 3 * N,
    "with a base": E * 2 * (O + N),
    "base, right shared": E * 2 * O,
    "base, left shared": E * 2 * N,
    "base with some columns": E * 2 * (O + N),
    "silu": E * O * 4 + E * 3,
    "tanh": E * O * 4 + E * 3,
    "canonical": 8 * E,
    "ring": 2 * E * 3,
}
EACH = pytest.mark.parametrize("name", SPECS)


def drawn(name: str) -> Factors:
    torch.manual_seed(0)
    factors = factors_of(SHAPE, SPECS[name], torch.zeros(0, dtype=torch.float64))
    for parameter in factors.parameters():
        parameter.data.normal_()
    if "columns" in dict(factors.named_buffers()):
        factors.columns.copy_(torch.tensor([0, 2, 3, 6]))
    return factors


def by_formula(factors: Factors, expert: int) -> Tensor:
    """One matrix [O, N], by loops over what the formula sums."""
    part, spec = dict(factors.named_parameters()), factors.spec
    if spec["kind"] == "whole":
        return part["weight"][expert]
    if spec["kind"] == "low_rank":
        left, right = (
            part[side] if spec.get("shared") == side else part[side][expert]
            for side in ("left", "right")
        )
        base = torch.zeros(O, N, dtype=torch.float64)
        if spec.get("base"):
            columns = [0, 2, 3, 6] if spec["base"] == 4 else list(range(N))
            for place, column in enumerate(columns):
                base[:, column] = part["base"][:, place]
        return base + sum(torch.outer(left[:, r], right[r]) for r in range(spec["rank"]))
    if spec["kind"] == "mixed_bases":
        mixed = sum(part["mixture"][expert, j] * part["bases"][j] for j in range(spec["bases"]))
        phi = mixed * torch.sigmoid(mixed) if spec["activation"] == "silu" else torch.tanh(mixed)
        return part["left"][expert] @ phi
    if spec["kind"] == "canonical":
        return sum(
            part["experts"][expert, r] * torch.outer(part["left"][:, r], part["right"][r])
            for r in range(spec["rank"])
        )
    first, second, third = spec["ranks"]
    return sum(
        part["experts"][a, expert, b]
        * torch.outer(part["outputs"][c, :, a], part["inputs"][b, :, c])
        for a in range(first) for b in range(second) for c in range(third)
    )  # fmt: skip


@EACH
def test_the_matrices_are_those_of_the_formula(name: str) -> None:
    factors, x_TN = drawn(name), torch.randn(4, N, dtype=torch.float64)
    dense = factors.dense()
    for expert in range(E):
        expected = by_formula(factors, expert)
        torch.testing.assert_close(dense[expert], expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(factors.product(expert, x_TN), x_TN @ expected.T)


@EACH
def test_outer_is_linear_so_that_a_sum_over_experts_comes_first(name: str) -> None:
    factors, x_TN = drawn(name), torch.randn(4, N, dtype=torch.float64)
    z = factors.inner(x_TN)
    cores = [factors.core(expert, z) for expert in (1, 3)]
    assert cores[0].shape == (4, factors.core_size)
    together = factors.outer(0.25 * cores[0] + 2.0 * cores[1])
    expected = 0.25 * factors.product(1, x_TN) + 2.0 * factors.product(3, x_TN)
    torch.testing.assert_close(together, expected)


@EACH
def test_parameters_are_counted(name: str) -> None:
    factors = drawn(name)
    assert num_factor_parameters(SHAPE, SPECS[name]) == COUNTS[name]
    assert sum(parameter.numel() for parameter in factors.parameters()) == COUNTS[name]
    shared = COUNTS[name] - PER_EXPERT[name]
    assert factors.active_parameters(top_k=2) == shared + PER_EXPERT[name] * 2 // E
    assert factors.active_parameters(top_k=E) == COUNTS[name]


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(
        UserError, match="kind 'trees' are not known; known are canonical, low_rank"
    ):
        factors_of(SHAPE, {"kind": "trees"}, torch.zeros(0))
