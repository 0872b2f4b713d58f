"""Items of the tiny tasks: right, unseen, and with choices alike but for being right."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from small_suites import NUM_ITEMS

from moe_lab.data import standard_library
from moe_lab.evaluate.tasks.tiny import items, tasks


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", tasks.MULTIPLE_CHOICE)
def test_choices_are_distinct_equally_long_and_balanced(
    name: str, written: dict[str, Path]
) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(items.TOKENIZER))
    rows = _read(written[name])
    assert len(rows) == NUM_ITEMS
    positions = Counter(row["answer"] for row in rows)
    assert set(positions) == set(range(4))
    assert max(positions.values()) - min(positions.values()) <= 1
    for row in rows:
        assert len(set(row["choices"])) == items.NUM_CHOICES
        context = tokenizer.encode(row["context"]).ids
        assert len(context) <= 64
        lengths = set()
        for choice in row["choices"]:
            whole = tokenizer.encode(row["context"] + choice).ids
            assert whole[: len(context)] == context
            lengths.add(len(whole) - len(context))
        assert len(lengths) == 1


@pytest.mark.parametrize("domain", ["prose", "code"])
def test_choices_come_from_one_held_out_document(domain: str, written: dict[str, Path]) -> None:
    documents = standard_library.documents(domain, "test")
    for row in _read(written[f"tiny_{domain}"]):
        right = row["context"] + row["choices"][row["answer"]]
        homes = [document for document in documents if right in document]
        assert any(all(choice in home for choice in row["choices"]) for home in homes)


def test_arithmetic_answers_are_right_and_unseen(written: dict[str, Path]) -> None:
    train = {
        line for d in standard_library.documents("arithmetic", "train") for line in d.splitlines()
    }
    for row in _read(written["tiny_arithmetic"]):
        problem = row["context"].splitlines()[-1].removesuffix("=")
        answer = row["choices"][row["answer"]]
        assert eval(problem) == int(answer)
        assert f"{problem}={answer}" not in train


def test_answers_that_are_generated_are_those_that_are_chosen(written: dict[str, Path]) -> None:
    for domain in ("arithmetic", "recall"):
        chosen, generated = (_read(written[f"tiny_{domain}{kind}"]) for kind in ("", "_generate"))
        assert [row["context"] for row in chosen] == [row["context"] for row in generated]
        for row, other in zip(chosen, generated, strict=True):
            assert row["choices"][row["answer"]].strip() == other["answer"]
    with pytest.raises(ValueError, match="'prose' asks no questions"):
        items.generative("prose", 1, 0)


def test_recall_answers_follow_from_the_list(written: dict[str, Path]) -> None:
    for row in _read(written["tiny_recall"]):
        *lines, question = row["context"].splitlines()
        pairs = dict(line.split(" ") for line in lines)
        value = pairs[question.removeprefix(standard_library.PARTNER_SIGN)]
        assert row["choices"][row["answer"]].strip() == standard_library.partner(value)
