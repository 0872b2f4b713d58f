"""Numbers that are none: found, and named."""

from __future__ import annotations

import math

import pytest
import torch

from moe_lab.finite import check_experts, check_number, check_scores, not_finite_in
from moe_lab.types import NotFinite, UserError

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.tensor([1.0, NAN, NAN]), r"^layer 4, expert 1: its norm is NaN$"),
        (torch.tensor([1.0, 2.0, -INF]), r"^layer 4, expert 2: its norm is -infinite$"),
        (torch.tensor([NAN, INF]), r"^layer 4, each expert: its norm is NaN$"),
        (torch.tensor([[1.0, 1.0], [0.0, INF]]), r"^layer 4, expert 1: its norm is infinite$"),
        (torch.tensor([INF]), r"^layer 4, expert 0: its norm is infinite$"),
    ],
)
def test_the_first_expert_is_named(value: torch.Tensor, message: str) -> None:
    with pytest.raises(NotFinite, match=message) as raised:
        check_experts(value, "its norm", 4)
    assert raised.value.layer == 4


def test_what_is_finite_passes_however_large() -> None:
    check_experts(torch.tensor([1e308, -1e308, 0.0], dtype=torch.float64), "it", 0)
    check_experts(torch.zeros(0, 3), "it", 0)
    check_number(1e308, "it")
    check_scores(0, 2, torch.tensor([0, 1]), "counting")


def test_a_number_and_a_score_that_are_none() -> None:
    with pytest.raises(NotFinite, match=r"^the loss is infinite$"):
        check_number(INF, "the loss")
    with pytest.raises(UserError, match=r"value by my metric is NaN\. .*formula") as raised:
        check_scores(2, 2, torch.tensor([0.0, NAN]), "my metric")
    assert not isinstance(raised.value, NotFinite), "no weight is to blame"
    with pytest.raises(UserError, match=r"shape \[2, 1\], and there are 2 experts"):
        check_scores(2, 2, torch.zeros(2, 1), "my metric")


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"scores": [0.0, 1.0, NAN]}, "scores[2]"),
        ({"a": {"b": (1, [2.0, INF])}}, "a.b[1][1]"),
        ([{"x": 1}, {"x": -INF}], "[1].x"),
        ({"text": "nan", "none": None, "yes": True, "one": 1, "two": 2.0}, None),
        ([], None),
    ],
)
def test_where_plain_values_hold_one(value: object, place: str | None) -> None:
    assert not_finite_in(value) == place
