"""Mixtures: their shares, pairs beside text, parts as groups, splits that stay apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from documents import TEMPLATES, Endless, answers, decoded, files

from moe_lab.data.mixture import Mixture
from moe_lab.types import UserError


def test_a_mixture_keeps_its_shares(tokenizer: Any) -> None:
    weights = {"a": 3, "b": 1}
    parts = {
        name: {"weight": weight, "source": Endless(1, number)}
        for number, (name, weight) in enumerate(weights.items(), start=1)
    }
    mixture = Mixture(num_samples=100, max_length=64, parts=parts)
    found = decoded(mixture.tokens(tokenizer), tokenizer)
    counts = [found.count(f"sample of length {number}") for number in (1, 2)]
    assert sum(counts) == 100 and abs(counts[0] - 75) <= 1
    assert mixture.tokens(tokenizer).fingerprint == mixture.tokens(tokenizer).fingerprint
    with pytest.raises(UserError, match="above 0"):
        Mixture(num_samples=2, max_length=8, parts={"a": {"weight": 0, "source": None}}).documents()


def test_a_mixture_of_pairs_and_text(questions: Path, lines: Path, tokenizer: Any) -> None:
    parts = {
        "pairs": {"weight": 1, "source": files(questions, **TEMPLATES)},
        "text": {"weight": 1, "source": files(lines)},
    }
    mixture = Mixture(num_samples=8, max_length=64, parts=parts)
    tokens = mixture.tokens(tokenizer)
    learned = answers(tokens, tokenizer)
    for whole, answer, prompt in zip(
        decoded(tokens, tokenizer), learned, tokens.prompts, strict=True
    ):
        assert answer == (whole if whole.startswith("document") else whole.partition("=")[2])
        assert (prompt > 0) == ("=" in whole)
    assert mixture.sources() == (str(questions), str(lines))


# One row of each dataset that the supervised mixture reads, with its columns, and what is learned.
CHOICES = {"label": ["A", "B", "C", "D"], "text": ["w", "x", "y", "z"]}
ROWS_OF = {
    "boolq": ({"question": "is it", "passage": "It is.", "answer": True}, " yes"),
    "piqa": ({"goal": "g", "sol1": "first", "sol2": "second", "label": 1}, " second"),
    "hellaswag": (
        {"activity_label": "a", "ctx": "c", "endings": ["e", "f", "g", "h"], "label": "2"},
        " g",
    ),
    "winogrande": (
        {"sentence": "the _ is", "option1": "cat", "option2": "dog", "answer": "1"},
        " cat",
    ),
    "openbookqa": ({"question_stem": "q", "choices": CHOICES, "answerKey": "D"}, " z"),
    "arc_easy": ({"question": "q", "choices": CHOICES, "answerKey": "3"}, " y"),
    "arc_challenge": ({"question": "q", "choices": CHOICES, "answerKey": "A"}, " w"),
    "mmlu": ({"train": {"question": "q", "choices": ["w", "x", "y", "z"], "answer": 3}}, " D"),
}


def test_the_supervised_mixture_reads_training_splits_alone(composed: Any) -> None:
    """Every part's templates fit its dataset's columns; validation never meets training."""
    from hydra.utils import instantiate

    config = composed("finetune=cd_moe").finetune.phases.sft
    data, validation = (
        instantiate(config[name], _convert_="object") for name in ("data", "validation")
    )
    assert data.parts.keys() == validation.parts.keys() == ROWS_OF.keys()
    for name, (row, answer) in ROWS_OF.items():
        source, held_out = (mixture.parts[name]["source"] for mixture in (data, validation))
        assert (source.split, held_out.split) == ("train[:-100]", "train[-100:]")
        pair = source._pair(source.path, row)
        assert pair.answer == answer and pair.prompt and not pair.prompt.endswith(" ")
        assert held_out._pair(source.path, row) == pair
    assert all("train" in name for name in data.sources())


def test_a_mixture_is_grouped_by_part(tokenizer: Any) -> None:
    parts = {
        name: {"weight": 1, "source": Endless(1, number)}
        for number, name in enumerate("ab", start=1)
    }
    tokens = Mixture(8, 64, parts=parts, group_by="part").tokens(tokenizer)
    assert tokens.samples == Mixture(8, 64, parts=parts).tokens(tokenizer).samples
    numbers = {"a": "1", "b": "2"}
    assert [words[-1] for words in decoded(tokens, tokenizer)] == [
        numbers[g] for g in tokens.groups
    ]
    assert sorted(set(tokens.groups)) == ["a", "b"]
    one = Mixture(8, 64, parts=parts, group_by="part", group="b").tokens(tokenizer)
    assert {words[-1] for words in decoded(one, tokenizer)} == {"2"} and len(one.samples) == 8
    for options, message in (
        ({"group_by": "domain"}, "one field to group by, part"),
        ({"group_by": "part", "group": "c"}, "group=c: by part there are a, b"),
    ):
        with pytest.raises(UserError, match=message):
            Mixture(8, 64, parts=parts, **options).tokens(tokenizer)
