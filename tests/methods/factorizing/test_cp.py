"""CP: tensors that are made with a rank, starts, and sizes that are too large."""

from __future__ import annotations

import pytest
import torch

from moe_lab.methods.factorizing.base import ExpertMatrices, relative_error, stack_values
from moe_lab.methods.factorizing.cp import CP, largest_components
from moe_lab.types import UserError

SHAPE = E, O, N = 6, 5, 8  # noqa: E741


def made(rank: int, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    experts, left, right = (torch.randn(size, rank).double() for size in SHAPE)
    return torch.einsum("er,or,nr->eon", experts, left, right)


@pytest.mark.parametrize("start", ["svd", "random"])
def test_a_tensor_of_the_rank_is_found_again(start: str) -> None:
    given, spec = ExpertMatrices("gate", made(3)), {"kind": "canonical", "rank": 3}
    assert relative_error(given, CP(start=start, sweeps=300).fit(given, spec, 0)) < 1e-9


def test_the_start_is_the_largest_singular_components() -> None:
    tensor = made(20)
    experts, left, right = largest_components(tensor, 9)
    found = torch.einsum("er,or,nr->eon", experts, left, right)
    s = torch.linalg.svdvals(tensor).flatten().sort(descending=True).values
    lost = float((tensor - found).square().sum())
    assert lost == pytest.approx(float(s[9:].square().sum()))
    every = {"kind": "canonical", "rank": E * O}
    whole = stack_values(CP(sweeps=0).fit(ExpertMatrices("up", tensor), every, 0), SHAPE)
    torch.testing.assert_close(whole, tensor)


def test_rounds_lower_the_error() -> None:
    given, spec = ExpertMatrices("gate", made(20)), {"kind": "canonical", "rank": 9}
    errors = [relative_error(given, CP(sweeps=number).fit(given, spec, 0)) for number in range(4)]
    assert errors == sorted(errors, reverse=True) and errors[3] < 0.95 * errors[0]


def test_a_random_start_follows_its_seed() -> None:
    given, spec = ExpertMatrices("gate", made(20), seed=5), {"kind": "canonical", "rank": 9}
    one, same, other = (
        CP(start="random", sweeps=1, seed=seed).fit(given, spec, 0).tensors["left"]
        for seed in (0, 0, 1)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_too_many_components_are_refused() -> None:
    with pytest.raises(UserError, match=r"41,943 components.*form=tr or form=svd"):
        CP().spec("gate", (64, 1408, 2048), int(0.8 * 64 * 1408 * 2048))
