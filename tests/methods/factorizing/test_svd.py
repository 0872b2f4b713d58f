"""Every matrix by itself, by rank and by loss."""

from __future__ import annotations

import pytest
import torch

from moe_lab.methods.factorizing.base import ExpertMatrices, relative_error, stack_values
from moe_lab.methods.factorizing.svd import SVD
from moe_lab.models.factors import num_factor_parameters

SHAPE = E, O, N = 4, 6, 9  # noqa: E741


def matrices(tokens: int = 40, silent: int | None = None) -> ExpertMatrices:
    torch.manual_seed(0)
    weight, x = torch.randn(SHAPE).double(), torch.randn(E, tokens, N).double()
    if silent is not None:
        x[silent] = 0
    return ExpertMatrices("gate", weight, x.mT @ x, torch.full((E,), float(tokens)).double())


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8, 0.95])
def test_the_rank_is_the_papers(ratio: float) -> None:
    spec = SVD().spec("gate", SHAPE, int(ratio * E * O * N))
    assert spec["rank"] == int(O * N * ratio / (O + N))
    assert num_factor_parameters(SHAPE, spec) == E * spec["rank"] * (O + N)


def test_the_loss_on_the_text_is_what_the_singular_values_say() -> None:
    given, spec = matrices(), {"kind": "low_rank", "rank": 2}
    fitted = SVD(damping=1e-12).fit(given, spec, 0)
    lost = whole = 0.0
    for weight, covariance in zip(given.weight, given.covariance, strict=True):
        s = torch.linalg.svdvals(weight @ torch.linalg.cholesky(covariance)).square()
        lost, whole = lost + float(s[2:].sum()), whole + float(s.sum())
    assert relative_error(given, fitted) == pytest.approx(lost / whole, rel=1e-6)


def test_an_expert_without_tokens_has_the_plain_svd() -> None:
    given, spec = matrices(silent=1), {"kind": "low_rank", "rank": 2}
    found = stack_values(SVD().fit(given, spec, 0), SHAPE)
    plain = stack_values(
        SVD(whiten=False).fit(ExpertMatrices("gate", given.weight), spec, 0), SHAPE
    )
    torch.testing.assert_close(found[1], plain[1])
    assert not torch.allclose(found[0], plain[0], atol=0.05)
