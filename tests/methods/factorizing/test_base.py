"""What all forms of factors have in common."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moe_lab.methods.factorizing.base import (
    FORMS,
    ExpertMatrices,
    Factorization,
    Fitted,
    relative_error,
    stack_values,
)
from moe_lab.methods.factorizing.cp import CP
from moe_lab.methods.factorizing.d2moe import D2MoE
from moe_lab.methods.factorizing.mobe import MoBE
from moe_lab.methods.factorizing.shared_basis import SharedBasis
from moe_lab.methods.factorizing.svd import SVD
from moe_lab.methods.factorizing.tr import TR
from moe_lab.models.factors import num_factor_parameters
from moe_lab.types import UserError

SHAPE = E, O, N = 6, 5, 8  # noqa: E741
WHOLE = E * O * N
FORM_OF: dict[str, Callable[[], Factorization]] = {
    "svd": SVD,
    "shared_basis": SharedBasis,
    "inputs": lambda: SharedBasis(side="inputs"),
    "d2moe": lambda: D2MoE(weighting="frequency"),
    "U": lambda: D2MoE(weighting="none", share="U"),
    "V": lambda: D2MoE(weighting="fisher", share="V", pp_ratio=0.25),
    "mobe": lambda: MoBE(steps=0),
    "cp": CP,
    "tr": TR,
}
EACH = pytest.mark.parametrize("form", FORM_OF)


def matrices(name: str = "gate", seed: int = 0) -> ExpertMatrices:
    generator = torch.Generator().manual_seed(seed)
    weight, x = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in (SHAPE, (E, 30, N))
    )
    count = torch.full((E,), 30.0, dtype=torch.float64)
    return ExpertMatrices(name, weight, x.mT @ x, count, weight.mean(dim=0))


@EACH
@pytest.mark.parametrize("name", ["gate", "down"])
def test_the_budget_is_kept_and_used_as_whole_ranks_allow(form: str, name: str) -> None:
    made = FORM_OF[form]()
    for budget in (WHOLE * 3 // 4, WHOLE * 9 // 10):
        spec = made.spec(name, SHAPE, budget)
        number = num_factor_parameters(SHAPE, spec)
        if spec["kind"] == "whole":
            continue
        assert number <= budget
        if "rank" in spec:
            more = dict(spec) | {"rank": spec["rank"] + 1}
            most = {"canonical": E * O, "mixed_bases": O}.get(spec["kind"], min(O, N))
            most = N if spec.get("shared") == "right" else most
            most = O if spec.get("shared") == "left" else most
            assert spec["rank"] == most or num_factor_parameters(SHAPE, more) > budget
        fitted = made.fit(matrices(name), spec, budget)
        assert num_factor_parameters(SHAPE, fitted.spec) <= budget
        assert stack_values(fitted, SHAPE).shape == SHAPE


@EACH
def test_a_budget_without_a_rank_is_refused(form: str) -> None:
    with pytest.raises(
        UserError, match=r"gate projections of a layer may have 7 of 240 parameters"
    ):
        FORM_OF[form]().spec("gate", SHAPE, 7)


@EACH
def test_it_gives_the_same_twice(form: str) -> None:
    made = FORM_OF[form]()
    spec = made.spec("gate", SHAPE, WHOLE * 3 // 4)
    one, other = (made.fit(matrices(), spec, WHOLE * 3 // 4) for _ in range(2))
    assert one.spec == other.spec
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


def test_errors_are_shares_of_the_outputs_or_of_the_weights() -> None:
    given = matrices()
    rank = {"kind": "low_rank", "rank": 2, "shared": None, "base": None}
    zeros = {"left": torch.zeros(E, O, 2).double(), "right": torch.zeros(E, 2, N).double()}
    assert relative_error(given, Fitted(rank, zeros)) == pytest.approx(1.0)
    half = Fitted({"kind": "whole"}, {"weight": given.weight / 2})
    assert relative_error(given, half) == pytest.approx(0.25)
    alone = ExpertMatrices("gate", given.weight)
    assert relative_error(alone, half) == pytest.approx(0.25)
    one = given.weight.clone()
    one[0] = 0  # an expert that is lost counts by what it computes
    lost = Fitted({"kind": "whole"}, {"weight": one})
    sizes = torch.einsum("eon,enm,eom->e", given.weight, given.covariance, given.weight)
    assert relative_error(given, lost) == pytest.approx(float(sizes[0] / sizes.sum()))


def test_forms_are_known_by_name() -> None:
    assert FORMS.made("shared_basis") == SharedBasis()
    assert FORMS.made(SVD(whiten=False)).needs_inputs is False
    with pytest.raises(
        UserError, match=r"method.form='svds'.*cp, d2moe, mobe, shared_basis, svd, tr"
    ):
        FORMS.made("svds")
    assert FORMS.described("tr") == {"form": "tr", "sweeps": 5}
