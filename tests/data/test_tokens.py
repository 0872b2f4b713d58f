"""Samples as token batches: padding, labels, order, and what fingerprints tell apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from documents import TEMPLATES, files

from moe_lab.data.tokens import IGNORED, Tokens


def test_batches_pad_on_the_right_with_mask_zero(lines: Path, tokenizer: Any) -> None:
    tokens = files(lines).tokens(tokenizer)
    batches = tokens.batches(5)
    assert [len(batch["input_ids"]) for batch in batches] == [5, 5, 2]
    seen = []
    for batch in batches:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        assert ids.shape == mask.shape and mask.sum(1).amax() == ids.shape[1]
        assert torch.equal(mask, mask.sort(dim=1, descending=True).values)
        assert (ids[mask == 0] == tokenizer.pad_token_id).all()
        seen += [tuple(row[keep.bool()].tolist()) for row, keep in zip(ids, mask, strict=True)]
    assert sorted(seen) == sorted(tokens.samples)


def test_batches_hold_samples_of_similar_length(lines: Path, tokenizer: Any) -> None:
    shuffled = files(lines).tokens(tokenizer).shuffled(3)
    lengths = [batch["attention_mask"].sum(1).tolist() for batch in shuffled.batches(4)]
    assert lengths == [[11, 12, 13, 14], [15, 16, 17, 18], [19, 20, 22, 23]]


def test_shuffled_keeps_all_and_depends_on_the_seed(lines: Path, tokenizer: Any) -> None:
    tokens = files(lines).tokens(tokenizer)
    first, again, second = (tokens.shuffled(seed) for seed in (1, 1, 2))
    assert first.samples == again.samples != second.samples != tokens.samples
    assert sorted(first.samples) == sorted(tokens.samples)


def test_fingerprints_tell_data_apart(lines: Path, tokenizer: Any, tmp_path: Path) -> None:
    same = files(lines).tokens(tokenizer).fingerprint
    assert files(lines).tokens(tokenizer).fingerprint == same
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_bytes(lines.read_bytes())
    assert files(moved).tokens(tokenizer).fingerprint == same, "paths never enter"
    others = [
        files(lines, num_samples=11),
        files(lines, max_length=8),
        files(lines, field="other"),
        files(lines, pack=True, max_length=8),
    ]
    prints = [source.tokens(tokenizer).fingerprint for source in others]
    assert len({same, *prints}) == 5
    assert all(len(text) == 12 and int(text, 16) >= 0 for text in prints)
    assert Tokens(((1, 2), (3,)), 0).fingerprint != Tokens(((1,), (2, 3)), 0).fingerprint


def test_labels_leave_out_padding_and_prompts() -> None:
    """Also padding whose id is one of the text's, as where the end stands for it."""
    tokens = Tokens(((5, 6, 7, 9), (5, 9)), pad_id=9, prompts=(2, 1))
    batch = tokens.labelled()
    assert batch["input_ids"].tolist() == [[5, 6, 7, 9], [5, 9, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    no = IGNORED
    assert batch["labels"].tolist() == [[no, no, 7, 9], [no, 9, no, no]]
    assert Tokens(tokens.samples, 9).labelled()["labels"].tolist()[1] == [5, 9, no, no]


def test_prompts_stay_with_their_samples(questions: Path, tokenizer: Any) -> None:
    tokens = files(questions, **TEMPLATES).tokens(tokenizer)
    of = dict(zip(tokens.samples, tokens.prompts, strict=True))
    for other in (tokens.shuffled(3), tokens.by_length(), tokens.take([4, 1])):
        assert [of[sample] for sample in other.samples] == list(other.prompts)
    assert tokens.shuffled(3).samples == Tokens(tokens.samples, 0).shuffled(3).samples
    moved = Tokens(tokens.samples, tokens.pad_id, (1,) * 6)
    assert moved.fingerprint != tokens.fingerprint


def test_groups_follow_their_samples(labelled: Path, tokenizer: Any) -> None:
    tokens = files(labelled, group_by="subject").tokens(tokenizer)
    pairs = sorted(zip(tokens.samples, tokens.groups, strict=True))
    for moved in (tokens.shuffled(3), tokens.by_length()):
        assert sorted(zip(moved.samples, moved.groups, strict=True)) == pairs
    assert tokens.shuffled(3).groups != tokens.groups
    assert tokens.take([4, 0]).groups == ("b", "a")


def test_fingerprints_know_the_groups(labelled: Path, tokenizer: Any) -> None:
    plain = files(labelled).tokens(tokenizer).fingerprint
    by = [
        files(labelled, group_by=name).tokens(tokenizer).fingerprint for name in ("subject", "year")
    ]
    assert len({plain, *by}) == 3


def test_batches_keep_to_a_number_of_tokens() -> None:
    lengths = [3, 1, 40, 4, 4, 2, 9, 10]
    tokens = Tokens(tuple(tuple(range(3, 3 + length)) for length in lengths), pad_id=0)
    shapes = [tuple(batch["input_ids"].shape) for batch in tokens.batches(3, num_tokens=16)]
    assert shapes == [(3, 3), (2, 4), (1, 9), (1, 10), (1, 40)]
    assert [len(batch["input_ids"]) for batch in tokens.batches(3)] == [3, 3, 2]
    assert tokens.batches(3, num_tokens=16)[-1]["attention_mask"].all(), "a long one is alone"
