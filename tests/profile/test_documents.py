"""Documents to fit on and documents to judge by never overlap, and none is left out."""

from __future__ import annotations

import pytest

from moe_lab.profile.documents import held_out, to_fit_and_choose
from moe_lab.types import UserError


@pytest.mark.parametrize("number", [6, 7, 64])
def test_every_document_has_one_part(number: int) -> None:
    fit, choose = to_fit_and_choose(number)
    assert sorted(fit + choose) == list(range(number))
    assert 0 < len(choose) < len(fit)


def test_held_out_documents_are_of_those_given() -> None:
    held = held_out([9, 3, 5, 8, 0, 2, 11])
    assert held == {5}
    fit, _ = to_fit_and_choose(64)
    assert held_out(fit) < set(fit)
    assert len(held_out(fit)) == len(fit) // 4


def test_too_few_documents_are_refused_with_the_way_out() -> None:
    with pytest.raises(UserError, match="at least 6.*calibration.num_samples"):
        to_fit_and_choose(5)
