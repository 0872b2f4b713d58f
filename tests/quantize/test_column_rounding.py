"""quantize/column_rounding.py against the update formula of OBQ, written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_lab.models.rounding import Scheme, dequantised, rounded
from moe_lab.quantize import column_rounding
from moe_lab.quantize.column_rounding import HessianSum, LevelChoice, gptq

SCHEMES = [Scheme(2), Scheme(4, 8), Scheme(3, 16, symmetric=False), Scheme(8)]


def inputs(width: int, number: int = 200, seed: int = 0) -> Tensor:
    """Inputs [n, width] that depend on each other, of very different sizes."""
    made = torch.Generator().manual_seed(seed)
    mixed = torch.randn(number, width, generator=made) @ torch.randn(width, width, generator=made)
    return mixed * torch.rand(width, generator=made).mul(3).exp()


def hessian(x_NI: Tensor) -> Tensor:
    return x_NI.T @ x_NI * (2 / len(x_NI))


def matrix(out: int, width: int, seed: int = 1) -> Tensor:
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed))


def by_obq(weight: Tensor, hessian_II: Tensor, given: LevelChoice) -> Tensor:
    """The levels' values: after each rounding the best change of all others, by OBQ's formula.

    delta = - (w_q - quant(w_q)) / [H_F^-1]_qq * (H_F^-1)_:q, F the columns not rounded yet, each
    H_F^-1 an inverse of its own.
    """
    scheme, width = given.scheme, weight.shape[1]
    damped = hessian_II.double().clone()
    dead = damped.diagonal() == 0
    damped[dead, dead] = 1.0
    damped += torch.eye(width) * given.damping * damped.diagonal().mean()
    stored = rounded(weight, scheme)
    each = width // stored.scale.shape[1]
    left, read = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    left[:, dead] = 0.0
    order = list(range(width))
    if given.act_order == "static":
        order = sorted(order, key=lambda place: -float(hessian_II[place, place]))
    for number, column in enumerate(order):
        scale = stored.scale[:, column // each].double()
        zero = 0 if stored.zero_point is None else stored.zero_point[:, column // each].double()
        most = 2 ** (scheme.bits - 1) - 1
        levels = (left[:, column] / scale + zero).round().clamp(-most - 1, most)
        read[:, column] = (levels - zero) * scale
        rest = order[number:]
        inverse = torch.linalg.inv(damped[rest][:, rest])
        error = (left[:, column] - read[:, column]) / inverse[0, 0]
        left[:, rest] -= error[:, None] * inverse[0]
    return read


@pytest.mark.parametrize("act_order", column_rounding.ACT_ORDERS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_equals_the_formula_of_obq(
    scheme: Scheme, act_order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        column_rounding, "COLUMNS_AT_ONCE", 12
    )  # blocks that do not divide the width
    x = inputs(32).double()
    x[:, 5] = 0
    weight, given = matrix(6, 32), LevelChoice(scheme, act_order=act_order)
    expected = by_obq(weight, hessian(x), given)
    read = dequantised(gptq(weight, hessian(x), given)).double()
    assert torch.allclose(read, expected, atol=1e-6)
    assert (read[:, 5] == 0).all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_independent_inputs_of_one_size_are_rounded_to_nearest(scheme: Scheme) -> None:
    weight = matrix(6, 32)
    ours, plain = gptq(weight, torch.eye(32), LevelChoice(scheme)), rounded(weight, scheme)
    assert torch.equal(ours.levels, plain.levels) and torch.equal(ours.scale, plain.scale)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_outputs_are_nearer_than_with_rounding_to_nearest(bits: int) -> None:
    x, weight, scheme = inputs(64), matrix(32, 64), Scheme(bits, 16)

    def lost(read: Tensor) -> float:
        return float((x @ (weight - read).T).square().sum())

    ours = lost(dequantised(gptq(weight, hessian(x), LevelChoice(scheme))))
    assert ours < 0.7 * lost(dequantised(rounded(weight, scheme)))


def test_scales_are_those_of_the_weights_before_any_change() -> None:
    weight, scheme = matrix(6, 32).bfloat16(), Scheme(3, 8, symmetric=False)
    ours, plain = gptq(weight, hessian(inputs(32)), LevelChoice(scheme)), rounded(weight, scheme)
    assert torch.equal(ours.scale, plain.scale) and ours.scale.dtype == torch.bfloat16
    assert torch.equal(ours.zero_point, plain.zero_point)
    assert not torch.equal(ours.levels, plain.levels)


def test_a_hessian_without_a_factor_leaves_rounding_to_nearest() -> None:
    weight, scheme = matrix(4, 8), Scheme(3)
    negative = -torch.ones(8, 8) + torch.eye(8) * 2
    assert torch.equal(
        gptq(weight, negative, LevelChoice(scheme)).levels, rounded(weight, scheme).levels
    )


def test_parts_add_up_to_the_hessian_of_all() -> None:
    x, total = inputs(8), HessianSum()
    for part in x.split(37):
        total.add(part)
    assert torch.allclose(total.value(), hessian(x), rtol=1e-5) and total.number == 200
