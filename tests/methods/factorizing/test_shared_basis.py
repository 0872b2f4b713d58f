"""One basis for all experts: on which side, and what it costs."""

from __future__ import annotations

import pytest
import torch

from moe_lab.methods.factorizing.base import ExpertMatrices, relative_error
from moe_lab.methods.factorizing.shared_basis import SharedBasis
from moe_lab.models.factors import num_factor_parameters

E, D, I = 5, 9, 6  # noqa: E741


def matrices(name: str) -> ExpertMatrices:
    torch.manual_seed(0)
    outputs, inputs = (D, I) if name == "down" else (I, D)
    weight, x = torch.randn(E, outputs, inputs).double(), torch.randn(E, 30, inputs).double()
    return ExpertMatrices(name, weight, x.mT @ x, torch.full((E,), 30.0).double())


@pytest.mark.parametrize(
    ("name", "side", "shared", "each"),
    [
        ("gate", "state", "right", E * I + D),
        ("up", "inputs", "right", E * I + D),
        ("down", "state", "left", E * I + D),
        ("down", "inputs", "right", E * D + I),
    ],
)
def test_the_side_and_its_parameters(name: str, side: str, shared: str, each: int) -> None:
    given = matrices(name)
    spec = SharedBasis(side=side).spec(name, given.shape, 200)
    assert spec["shared"] == shared
    assert num_factor_parameters(given.shape, spec) == spec["rank"] * each <= 200


def test_it_is_never_worse_than_with_another_basis() -> None:
    """Of the outputs on the text, against the basis of the weights alone."""
    for name in ("gate", "down"):
        given = matrices(name)
        spec = SharedBasis().spec(name, given.shape, 120)
        whitened, plain = (
            relative_error(given, SharedBasis(whiten=one).fit(given, spec, 0))
            for one in (True, False)
        )
        assert whitened <= plain * (1 + 1e-9) if name == "down" else whitened < 1.05 * plain
