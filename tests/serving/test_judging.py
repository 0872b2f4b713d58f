"""What is right, refused, crashed or silently wrong, on made-up answers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moe_lab.serving.judging import EngineAnswer, Judgement, beside_dense, judged_answer

TOLERANCE = 0.01
LOGPROBS = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]]).log()
REFERENCE: dict[str, Tensor] = {
    "logprobs": LOGPROBS,
    "tokens": torch.tensor([[0, 1, 2], [2, 2, 2]]),
    "margins": torch.tensor([[1.25, 1.0, 0.5], [0.7, 0.015, 0.9]]),
    "ends": torch.zeros(2, 3, dtype=torch.bool),
}
TOP = [{0: math.log(0.7), 1: math.log(0.2)}, {2: math.log(0.6), 1: math.log(0.3)}]
TOKENS = [[0, 1, 2], [2, 2, 2]]


def judged(top: list[dict[int, float]], tokens: list[list[int]]) -> Judgement:
    return judged_answer(EngineAnswer(top, tokens), REFERENCE, TOLERANCE)


def test_the_same_is_right() -> None:
    one = judged(TOP, TOKENS)
    assert one.verdict == "right" and one.tokens == "6/6" and one.difference < 1e-6


def test_rounding_is_right_and_told() -> None:
    one = judged([{0: math.log(0.7) + 0.004}, TOP[1]], TOKENS)
    assert one.verdict == "right" and one.difference == pytest.approx(0.004, abs=1e-5)


@pytest.mark.parametrize(
    "top",
    [
        [{0: math.log(0.7) + 0.02}, TOP[1]],
        [{0: math.nan}, TOP[1]],
        [TOP[0], {}],
        [TOP[0]],
        [{7: -1.0}, TOP[1]],
    ],
    ids=["too far", "no number", "nothing said", "a prompt too few", "no such token"],
)
def test_other_logprobs_are_silently_wrong(top: list[dict[int, float]]) -> None:
    assert judged(top, TOKENS).verdict == "silent"


def test_another_token_is_wrong_unless_both_are_as_good() -> None:
    clear = judged(TOP, [[0, 0, 2], [2, 2, 2]])
    assert clear.verdict == "silent" and clear.tokens == "4/6"
    tie = judged(TOP, [[0, 1, 2], [2, 0, 0]])
    assert tie.verdict == "right" and tie.tokens == "4/6", "the second is ahead by less than 0.02"
    assert judged(TOP, [[0, 1, 2], [2]]).verdict == "right", "it ends at the tie"
    assert judged(TOP, [[0, 1], [2, 2, 2]]).verdict == "silent", "a token is missing"


def test_an_engine_may_stop_at_the_end_of_a_text() -> None:
    """With the token that ends it, or without; nowhere else, and not behind another token."""
    ends = torch.tensor([[False, True, False], [False, False, False]])
    reference = REFERENCE | {"ends": ends}
    for first, verdict, tokens in (
        ([0, 1], "right", "5/5"),
        ([0], "right", "4/4"),
        ([], "silent", "3/6"),
        ([0, 2], "silent", "4/6"),
    ):
        answer = EngineAnswer(TOP, [first, [2, 2, 2]])
        one = judged_answer(answer, reference, TOLERANCE)
        assert (one.verdict, one.tokens) == (verdict, tokens), first


def test_an_error_is_a_refusal_in_a_line() -> None:
    answer = EngineAnswer(error="ValueError: no\n  such model " + "x" * 500)
    one = judged_answer(answer, REFERENCE, TOLERANCE)
    assert one.verdict == "refused" and one.detail.startswith("ValueError: no such model xxx")
    assert len(one.detail) < 300 and one.difference is None
    long = EngineAnswer(error="KeyError: no 'a.b.c' in Model. It may be\nthat you are wrong.")
    assert judged_answer(long, REFERENCE, TOLERANCE).detail == "KeyError: no 'a.b.c' in Model"
    crashed = judged_answer(EngineAnswer(error="it ended", crashed=True), REFERENCE, TOLERANCE)
    assert crashed.verdict == "crashed" and crashed.detail == "it ended"


def test_what_the_engine_does_to_the_dense_model_too_is_its_own_fault() -> None:
    wrong, right = Judgement("silent", 7.0, "0/6"), Judgement("right", 0.0, "6/6")
    assert beside_dense(wrong, wrong).verdict == "own fault"
    assert beside_dense(wrong, right) == wrong
    assert beside_dense(right, wrong) == right
    refused = Judgement("refused", detail="no")
    assert beside_dense(wrong, refused).verdict == "silent"


def test_answers_are_written_and_read() -> None:
    answer = EngineAnswer([{5: -0.5, 3: -1.5}], [[1, 2]])
    assert EngineAnswer.from_json(answer.to_json()) == answer
    assert EngineAnswer.from_json({"error": "no"}) == EngineAnswer(error="no")
