"""The options of trace."""

from __future__ import annotations

import pytest

from moe_lab.data.embedded import StandardLibrary
from moe_lab.data.tokens import Tokens
from moe_lab.trace.tracing import Tracing, prompts_of
from moe_lab.types import UserError


def test_requests_longer_than_the_model_are_refused() -> None:
    how = Tracing(StandardLibrary(4, 100), new_tokens=29)
    how.check_positions(None)
    how.check_positions(129)
    with pytest.raises(
        UserError, match=r"max_length=100 and trace.new_tokens=29 .* 129 tokens.*128"
    ):
        how.check_positions(128)


def test_impossible_values_are_refused() -> None:
    for wrong in ({"new_tokens": 0}, {"lookahead": -1}, {"batch_size": 0}, {"access": "random"}):
        with pytest.raises(UserError, match=r"^trace\."):
            Tracing(StandardLibrary(4, 100), **wrong)


def test_of_a_prompt_with_its_answer_the_prompt_is_continued() -> None:
    samples = ((1, 2, 3), (4, 5))
    assert prompts_of(Tokens(samples, 0)) == samples
    assert prompts_of(Tokens(samples, 0, prompts=(2, 0))) == ((1, 2), (4, 5))
