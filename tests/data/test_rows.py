"""Rows as documents: fields, templates, answers that are only numbered, groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from documents import TEMPLATES, answers, files

from moe_lab.types import UserError


def test_answers_that_rows_only_number(questions: Path, tokenizer: Any) -> None:
    named = {"0": " even {question}", "1": " odd"}
    source = files(questions, **(TEMPLATES | dict(answer="{label}", answers=named)))
    found = answers(source.tokens(tokenizer), tokenizer)
    assert found[:3] == [" even 0+0=", " odd", " even 2+2="]
    with pytest.raises(UserError, match="answer is '1'; answers= knows 0"):
        files(questions, **(TEMPLATES | dict(answer="{label}", answers={"0": "a"}))).tokens(
            tokenizer
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(answer="{answer}"), r"\['label', 'none', 'question', 'reply'\].*'\{answer\}'"),
        (dict(answer="{none}"), "do not fill the template '{none}'.*null"),
        (dict(answer=" "), "a row without an answer"),
        (dict(answer=None), "answer=None belong together"),
        (dict(prompt=None), "prompt=None.*belong together"),
        (dict(loss_on="prompt"), "loss_on=prompt: there are answer, all"),
        (dict(pack=True), "pack=true would cut prompts from their answers"),
        (dict(max_length=4), r"has 4 tokens, so that max_length=4 leaves nothing.*max_length=5"),
    ],
)
def test_pairs_that_cannot_be_learned(
    options: dict[str, Any], message: str, questions: Path, tokenizer: Any
) -> None:
    with pytest.raises(UserError, match=message):
        files(questions, **(TEMPLATES | options)).tokens(tokenizer)


def test_a_field_gives_each_sample_its_group(labelled: Path, tokenizer: Any) -> None:
    plain = files(labelled).tokens(tokenizer)
    tokens = files(labelled, group_by="subject").tokens(tokenizer)
    assert tokens.samples == plain.samples and plain.groups == ()
    assert tokens.groups == tuple("abc" * 4)
    assert files(labelled, group_by="year").tokens(tokenizer).groups == ("0",) * 6 + ("1",) * 6
    assert files(labelled, group_by="subject", num_samples=5).tokens(tokenizer).groups == tuple(
        "abcab"
    )
    parts = tokens.by_group()
    assert list(parts) == ["a", "b", "c"] and parts["b"].samples == plain.samples[1::3]
    assert plain.by_group() == {"": plain}
