"""D2-MoE: its base, its parameters, its columns."""

from __future__ import annotations

import pytest
import torch

from moe_lab.methods.factorizing.base import ExpertMatrices, stack_values
from moe_lab.methods.factorizing.d2moe import D2MoE
from moe_lab.models.factors import num_factor_parameters

SHAPE = E, O, N = 5, 6, 8  # noqa: E741


def matrices() -> ExpertMatrices:
    torch.manual_seed(0)
    weight, x = torch.randn(SHAPE).double(), torch.randn(E, 30, N).double()
    x[:, :, 3] *= 0.01  # an input that is hardly there
    count = torch.tensor([10.0, 20, 0, 30, 40]).double()
    return ExpertMatrices("up", weight, x.mT @ x, count, torch.randn(O, N).double())


@pytest.mark.parametrize(
    ("share", "each"),
    [("none", E * (O + N)), ("U", O + E * N), ("V", E * O + N)],
)
@pytest.mark.parametrize("pp_ratio", [0.0, 0.25])
def test_the_parameters_are_the_papers(share: str, each: int, pp_ratio: float) -> None:
    """One base less its pruned columns, and r (m + n) for every expert's difference."""
    form = D2MoE(share=share, pp_ratio=pp_ratio)
    spec = form.spec("up", SHAPE, int(0.8 * E * O * N))
    kept = N - int(pp_ratio * N)
    assert num_factor_parameters(SHAPE, spec) == O * kept + spec["rank"] * each
    assert spec["rank"] == min((int(0.8 * E * O * N) - O * kept) // each, O if share != "V" else N)


def test_the_base_is_what_weighs_the_experts() -> None:
    given, spec = matrices(), {"kind": "low_rank", "rank": 1, "shared": None, "base": N}
    by = {w: D2MoE(weighting=w).fit(given, spec, 0).tensors["base"]
          for w in ("fisher", "frequency", "none")}  # fmt: skip
    assert by["fisher"] is given.mean
    expected = sum(
        share * one for share, one in zip([0.1, 0.2, 0, 0.3, 0.4], given.weight, strict=True)
    )
    torch.testing.assert_close(by["frequency"], expected)
    torch.testing.assert_close(by["none"], given.weight.mean(dim=0))


@pytest.mark.parametrize("share", ["none", "U", "V"])
def test_full_rank_is_the_identity(share: str) -> None:
    given, shared = matrices(), {"none": None, "U": "left", "V": "right"}[share]
    rank = N if share == "V" else O
    spec = {"kind": "low_rank", "rank": rank, "shared": shared, "base": N}
    found = stack_values(D2MoE(share=share).fit(given, spec, 0), SHAPE)
    torch.testing.assert_close(found, given.weight, rtol=1e-9, atol=1e-9)


def test_columns_go_whose_output_is_smallest() -> None:
    given, spec = matrices(), {"kind": "low_rank", "rank": O, "shared": None, "base": N - 1}
    fitted = D2MoE(pp_ratio=0.125).fit(given, spec, 0)
    assert fitted.tensors["columns"].tolist() == [0, 1, 2, 4, 5, 6, 7]
    found = stack_values(fitted, SHAPE)
    rest = [column for column in range(N) if column != 3]
    torch.testing.assert_close(found[:, :, rest], given.weight[:, :, rest], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        given.weight[:, :, 3] - found[:, :, 3], given.mean[:, 3].expand(E, O)
    )


def test_what_it_needs_of_the_model() -> None:
    assert D2MoE().needs_fisher and D2MoE().needs_inputs
    plain = D2MoE(weighting="none", whiten=False)
    assert not (plain.needs_fisher or plain.needs_inputs or plain.needs_model)
    assert D2MoE(weighting="frequency", whiten=False).needs_inputs
