"""MoBE: its start, its fit, its parameters."""

from __future__ import annotations

import pytest
import torch

from moe_lab.methods.factorizing.base import ExpertMatrices, relative_error, stack_values
from moe_lab.methods.factorizing.mobe import MoBE
from moe_lab.models.factors import num_factor_parameters
from moe_lab.types import UserError

SHAPE = E, P, D = 6, 5, 9
SPEC = {"kind": "mixed_bases", "rank": 4, "bases": 2, "activation": "silu"}
torch.manual_seed(0)
WEIGHT = torch.randn(SHAPE).double() * 0.1


def test_the_start_is_the_truncated_svd_of_each_group() -> None:
    left, bases, omega = MoBE(logit=60.0).start(WEIGHT, SPEC)
    mixed = torch.einsum("em,mrn->ern", omega.softmax(dim=1), bases)
    for group in ([0, 1, 2], [3, 4, 5]):
        u, s, vt = torch.linalg.svd(WEIGHT[group].reshape(15, D), full_matrices=False)
        expected = ((u[:, :4] * s[:4]) @ vt[:4]).reshape(3, P, D)
        torch.testing.assert_close(left[group] @ mixed[group], expected)
    one_hot = MoBE(logit=1.0).start(WEIGHT, SPEC)[2]
    assert one_hot.tolist() == [[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 3
    share = float(one_hot.softmax(dim=1)[0, 0])
    assert share == pytest.approx(0.731, abs=1e-3), "the code's start mixes the bases"


@pytest.mark.parametrize("activation", ["silu", "tanh", "none"])
def test_the_fit_lowers_its_loss(activation: str) -> None:
    given, spec = ExpertMatrices("gate", WEIGHT), SPEC | {"activation": activation}
    errors = [
        relative_error(given, MoBE(activation=activation, steps=steps).fit(given, spec, 0))
        for steps in (0, 200, 600)
    ]
    assert errors[0] >= errors[1] >= errors[2]
    if activation != "none":  # which begins at the best there is of one basis for a group
        assert errors[2] < 0.8 * errors[0]


def test_its_best_is_never_worse_than_its_start() -> None:
    given = ExpertMatrices("gate", WEIGHT)
    fit = {"steps": 3, "learning_rate": 50.0}  # which leads astray
    start, astray = (
        relative_error(given, MoBE(**how).fit(given, SPEC, 0)) for how in ({"steps": 0}, fit)
    )
    assert astray == pytest.approx(start)


def test_a_basis_for_every_expert_without_activation_is_the_identity() -> None:
    spec = {"kind": "mixed_bases", "rank": P, "bases": E, "activation": "none"}
    given = ExpertMatrices("gate", WEIGHT)
    found = stack_values(MoBE(activation="none", steps=0, logit=80.0).fit(given, spec, 0), SHAPE)
    torch.testing.assert_close(found, WEIGHT, rtol=1e-5, atol=1e-6)  # float32, as Adam


def test_the_parameters_are_the_papers() -> None:
    """Gate and up 2 n p r + 2 m r d beside n p d of down, and n m coefficients for each."""
    form, shapes = MoBE(), {"gate": (E, P, D), "up": (E, P, D), "down": (E, D, P)}
    budgets = form.budgets(shapes, int(0.85 * 3 * E * P * D))
    specs = {name: form.spec(name, shape, budgets[name]) for name, shape in shapes.items()}
    rank, bases = specs["gate"]["rank"], specs["gate"]["bases"]
    total = sum(num_factor_parameters(shapes[name], specs[name]) for name in shapes)
    assert total == E * P * D + 2 * E * P * rank + 2 * bases * rank * D + 2 * E * bases
    assert specs["gate"] == specs["up"] and specs["down"] == {"kind": "whole"}
    assert rank == P, "the paper's: as many rows as the matrices have"
    assert total <= int(0.85 * 3 * E * P * D)


def test_bases_and_rank_can_be_given() -> None:
    spec = MoBE(bases=3, rank=2).spec("up", SHAPE, 250)
    assert (spec["bases"], spec["rank"]) == (3, 2)
    with pytest.raises(UserError, match=r"form.rank=5: with 3 bases there is room for 3 rows"):
        MoBE(bases=3, rank=5).spec("up", SHAPE, 200)
    with pytest.raises(UserError, match=r"form.bases=7: a layer has 6 experts"):
        MoBE(bases=7).spec("up", SHAPE, 250)
    with pytest.raises(UserError, match=r"gate projections of a layer may have 0 of 270"):
        MoBE().spec("gate", SHAPE, -20)


def test_down_projections_stay() -> None:
    given = ExpertMatrices("down", WEIGHT)
    assert MoBE().fit(given, {"kind": "whole"}, 0).tensors["weight"] is WEIGHT
