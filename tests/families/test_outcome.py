"""What is a refusal, what a fault, and what a difference."""

from __future__ import annotations

import torch

from moe_lab.families.outcome import difference, told
from moe_lab.models.layers import check_kept
from moe_lab.types import LayerInfo, UserError


def test_a_refusal_keeps_its_sentence() -> None:
    outcome = told(UserError("not\n so"))
    assert (outcome.state, outcome.detail) == ("refused", "not so")


def test_a_fault_names_its_place() -> None:
    try:
        check_kept(LayerInfo(0, "mlp", 8, "two", 4), 3)  # type: ignore[arg-type]
    except TypeError as error:
        outcome = told(error)
    assert outcome.state == "fault"
    assert "TypeError" in outcome.detail and "(layers.py, check_kept)" in outcome.detail


def test_a_difference_is_a_share_of_the_largest() -> None:
    one, other = torch.tensor([1.0, -4.0]), torch.tensor([1.0, -3.0])
    assert difference([other], [other]) == 0
    assert difference([one], [other]) == 1 / 3
    assert difference([other, one], [other, other]) == 1 / 3
    assert difference([one[:1]], [other]) == torch.inf
    assert difference([one / 0], [other]) == torch.inf
