"""The same share of experts in each layer."""

from __future__ import annotations

import pytest
import torch
from layer_scores import keep
from layer_statistics import FOUR

from moe_lab.methods.ratios.uniform import Uniform
from moe_lab.types import LayerInfo, UserError


def test_uniform_keeps_the_best_and_breaks_ties_downwards() -> None:
    scores = torch.tensor([1.0, 5.0, 5.0, 2.0])
    assert keep(Uniform(0.5), [(FOUR, scores)]) == {3: (1, 2)}
    assert keep(Uniform(0.25), [(FOUR, scores)]) == {3: (1, 2, 3)}
    assert keep(Uniform(0.0), [(FOUR, scores)]) == {3: (0, 1, 2, 3)}
    assert keep(Uniform(0.5), [(FOUR, torch.zeros(4))]) == {3: (0, 1)}


def test_groups_keep_the_same_number_each() -> None:
    info = LayerInfo(1, "x", 8, 2, 2, groups=2, groups_used=1)
    scores = torch.tensor([9.0, 8, 7, 6, 1, 2, 3, 4])
    assert keep(Uniform(0.25), [(info, scores)]) == {1: (0, 1, 2, 5, 6, 7)}
    with pytest.raises(UserError, match="groups"):
        Uniform(0.375).check([info])


def test_a_ratio_that_starves_the_router_is_refused_with_the_numbers() -> None:
    Uniform(0.5).check([FOUR])
    with pytest.raises(UserError, match=r"0\.75 is too much.*1 of 4.*chooses 2.*At most 0\.5"):
        Uniform(0.75).check([FOUR])
    for impossible in (-0.1, 1.0, float("nan")):
        with pytest.raises(UserError, match="at least 0"):
            Uniform(impossible).check([FOUR])
