"""The standard library and its questions as sources: splits, domains, refusals."""

from __future__ import annotations

from typing import Any

import pytest
from documents import answers, decoded

from moe_lab.data import standard_library
from moe_lab.data.embedded import StandardLibrary, StandardQuestions
from moe_lab.types import UserError


def test_the_standard_library(tokenizer: Any) -> None:
    sources = [
        StandardLibrary(16, 32),
        StandardLibrary(16, 32, seed=1),
        StandardLibrary(16, 32, split="test"),
        StandardLibrary(16, 32, domains=("arithmetic",)),
    ]
    prints = [source.tokens(tokenizer).fingerprint for source in sources]
    assert len(set(prints)) == 4
    assert StandardLibrary(16, 32).tokens(tokenizer).fingerprint == prints[0]
    sheets = decoded(sources[-1].tokens(tokenizer), tokenizer)
    assert all("=" in sheet for sheet in sheets)
    with pytest.raises(UserError, match="train, validation, test"):
        StandardLibrary(1, 8, split="tests").tokens(tokenizer)
    with pytest.raises(UserError, match="prose, code, arithmetic, recall"):
        StandardLibrary(1, 8, domains=("music",)).tokens(tokenizer)
    with pytest.raises(UserError, match="10000000 samples were asked for"):
        StandardLibrary(10_000_000, 8).tokens(
            lambda group, **_: {"input_ids": [(1, 2)] * len(group)}
        )


def test_the_standard_questions(tokenizer: Any) -> None:
    """Of their own split only, in the form of the sheets, half sums and half partners."""
    for split in ("train", "validation"):
        tokens = StandardQuestions(64, 99, split=split).tokens(tokenizer)
        problems = {f"{a}{sign}{b}": str(c) for a, sign, b, c in standard_library.problems(split)}
        found = [0, 0]
        for whole, answer in zip(
            decoded(tokens, tokenizer), answers(tokens, tokenizer), strict=True
        ):
            last = whole.split("\n")[-1]
            if "=" in last:
                assert problems[last.partition("=")[0]] == answer
                found[0] += 1
            else:
                key = last.removeprefix("?").partition(" ")[0]
                listed = dict(line.split(" ") for line in whole.split("\n")[:-1])
                assert answer == f" {standard_library.partner(listed[key])}"
                found[1] += 1
        assert found == [32, 32]
    sums = StandardQuestions(8, 99, domains=("arithmetic",)).tokens(tokenizer)
    assert all("=" in whole for whole in decoded(sums, tokenizer))
    with pytest.raises(UserError, match=r"domains=\[prose\]: there are arithmetic, recall"):
        StandardQuestions(8, 99, domains=("prose",)).tokens(tokenizer)


@pytest.mark.parametrize("kind", [StandardLibrary, StandardQuestions])
def test_the_embedded_text_is_grouped_by_domain(kind: Any, tokenizer: Any) -> None:
    domains = (
        standard_library.DOMAINS if kind is StandardLibrary else standard_library.QUESTION_DOMAINS
    )
    plain = kind(24, 512).tokens(tokenizer)
    tokens = kind(24, 512, group_by="domain").tokens(tokenizer)
    assert tokens.samples == plain.samples
    assert set(tokens.groups) == set(domains)
    one = kind(24, 512, group_by="domain", group="arithmetic").tokens(tokenizer)
    assert len(one.samples) == 24 and one.groups == ()
    assert all("=" in sample for sample in decoded(one, tokenizer))
    assert one.samples == kind(24, 512, domains=("arithmetic",)).tokens(tokenizer).samples
