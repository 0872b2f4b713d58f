"""What is a sample: whole documents, packed only when asked; answers; groups."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from documents import QUESTIONS, ROWS, TEMPLATES, Endless, answers, decoded, files

from moe_lab.data.embedded import StandardLibrary, StandardQuestions
from moe_lab.data.source import Pair, Source
from moe_lab.types import UserError


def test_one_document_is_one_sample(lines: Path, tokenizer: Any) -> None:
    tokens = files(lines).tokens(tokenizer)
    assert decoded(tokens, tokenizer) == ROWS
    assert tokens.num_tokens == sum(len(row) for row in ROWS)


def test_documents_are_truncated_and_never_packed(lines: Path, tokenizer: Any) -> None:
    tokens = files(lines, max_length=5).tokens(tokenizer)
    assert decoded(tokens, tokenizer) == [row[:5] for row in ROWS]


def test_packed_only_when_asked(lines: Path, tokenizer: Any) -> None:
    joined = "".join(ROWS)
    tokens = files(lines, max_length=20, pack=True, num_samples=6).tokens(tokenizer)
    assert decoded(tokens, tokenizer) == [joined[20 * i : 20 * i + 20] for i in range(6)]
    with pytest.raises(UserError, match=rf"40 samples.*only {len(joined) // 20} full samples"):
        files(lines, max_length=20, pack=True, num_samples=40).tokens(tokenizer)


def test_empty_documents_are_no_samples(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = ["", "  \n", "something", "\t", "more"]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    assert decoded(files(path, num_samples=2).tokens(tokenizer), tokenizer) == ["something", "more"]
    with pytest.raises(UserError, match="holds only 2 documents with text; ask for fewer"):
        files(path, num_samples=3).tokens(tokenizer)


def test_only_answers_are_learned(questions: Path, tokenizer: Any) -> None:
    tokens = files(questions, **TEMPLATES).tokens(tokenizer)
    whole = [row["question"] + row["reply"] for row in QUESTIONS]
    assert decoded(tokens, tokenizer) == whole
    assert answers(tokens, tokenizer) == [row["reply"] for row in QUESTIONS]
    assert tokens.num_targets == sum(len(row["reply"]) for row in QUESTIONS)
    everything = files(questions, loss_on="all", **TEMPLATES).tokens(tokenizer)
    assert everything.prompts == () and answers(everything, tokenizer) == whole
    plain = files(questions, num_samples=6, template="{question}{reply}").tokens(tokenizer)
    assert plain.fingerprint == everything.fingerprint != tokens.fingerprint


def test_long_prompts_can_be_left_out(tmp_path: Path, tokenizer: Any, caplog: Any) -> None:
    path = tmp_path / "long.jsonl"
    rows = [{"question": "x" * length, "reply": "yes"} for length in (3, 9, 4, 12, 5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = dict(max_length=6, prompt="{question}", answer="{reply}", skip_long=True)
    with caplog.at_level("INFO"):
        tokens = files(path, num_samples=3, **options).tokens(tokenizer)
    assert answers(tokens, tokenizer) == ["yes", "ye", "y"], "cut to max_length, something is left"
    with pytest.raises(UserError, match="holds only 3"):
        files(path, num_samples=4, **options).tokens(tokenizer)
    assert "left out were 2 prompts that were too long" in caplog.text


class Merging:
    """A tokenizer that joins a prompt's last letter with an answer's first, and ends each text."""

    pad_token_id = 0

    def __call__(self, texts: Any, truncation: bool = False, max_length: int = 99) -> Any:
        if isinstance(texts, str):
            return {"input_ids": self([texts])["input_ids"][0]}
        return {"input_ids": [[ord(c) for c in t.replace("ab", "X")] + [1] for t in texts]}


def test_a_token_across_the_border_belongs_to_the_answer() -> None:
    class One(Source):
        def documents(self) -> Any:
            yield Pair("cca", "bd")

    tokens = One(1, 9).tokens(Merging())
    assert tokens.samples == ((ord("c"), ord("c"), ord("X"), ord("d"), 1),)
    assert tokens.prompts == (2,)


def test_one_group_is_an_ordinary_calibration_set(labelled: Path, tokenizer: Any) -> None:
    one = files(labelled, group_by="subject", group="b", num_samples=4).tokens(tokenizer)
    assert decoded(one, tokenizer) == ROWS[1::3] and one.groups == ()
    plain = files(labelled).tokens(tokenizer).take(range(1, 12, 3))
    assert one.fingerprint == plain.fingerprint
    with pytest.raises(UserError, match=r"5 samples were asked for.*only 4"):
        files(labelled, group_by="subject", group="b", num_samples=5).tokens(tokenizer)


def test_groups_that_are_not_there_are_refused(labelled: Path, tokenizer: Any) -> None:
    for options, message in (
        ({"group_by": "topic"}, r"group_by=topic: .*\['subject', 'text', 'year'\]"),
        ({"group_by": "subject", "group": "d"}, r"group=d: .* by subject there are a, b, c"),
        ({"group": "a"}, r"group=a needs the field.*group_by"),
        ({"group_by": "subject", "pack": True}, r"group_by=subject with pack=true"),
    ):
        with pytest.raises(UserError, match=message):
            files(labelled, **options).tokens(tokenizer)
    with pytest.raises(UserError, match=r"group_by=topic: .*one field .*, domain"):
        StandardLibrary(4, 16, group_by="topic").tokens(tokenizer)
    with pytest.raises(UserError, match=r"group=music: by domain there are prose, code"):
        StandardLibrary(4, 16, group_by="domain", group="music").tokens(tokenizer)
    with pytest.raises(UserError, match=r"group=code: by domain there are arithmetic, recall"):
        StandardQuestions(4, 16, group_by="domain", group="code").tokens(tokenizer)
    with pytest.raises(UserError, match="has no fields"):
        Endless(2, 8, group_by="domain").tokens(tokenizer)
