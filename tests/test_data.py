"""Text as token batches: what is a sample, how batches pad, and what fingerprints tell apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_lab.data import Files, HubDataset, Mixture, StandardLibrary, Texts, Tokens
from moe_lab.types import UserError

ROWS = [f"document {number} " + "x" * number for number in range(12)]


def files(path: Path, **options: Any) -> Files:
    return Files(**({"num_samples": 12, "max_length": 64, "files": (str(path),)} | options))


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": row, "other": row[::-1]}) + "\n" for row in ROWS))
    return path


def decoded(tokens: Tokens, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(list(sample)) for sample in tokens.samples]


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


def test_jsonl_parquet_and_text_read_alike(lines: Path, tokenizer: Any, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ROWS, "number": range(12)}), table)
    plain = []
    for number, row in enumerate(ROWS):
        plain.append(tmp_path / f"{number}.txt")
        plain[-1].write_text(row)
    expected = files(lines).tokens(tokenizer).samples
    assert files(table).tokens(tokenizer).samples == expected
    named = tuple(str(path) for path in plain)
    assert files(lines, files=named).tokens(tokenizer).samples == expected


def test_a_text_file_is_one_document_and_lines_may_hold_any_unicode(
    tokenizer: Any, tmp_path: Path
) -> None:
    text = tmp_path / "one.txt"
    text.write_text("first\n\nsecond", encoding="utf-8")
    rows = tmp_path / "rows.jsonl"
    odd = ["line\u2028separator", "né\x85xt", "日本"]
    dumped = [json.dumps({"text": row}, ensure_ascii=False) for row in odd]
    rows.write_text("\n\n".join(dumped), encoding="utf-8")
    both = files(text, files=(str(text), str(rows)), num_samples=4)
    assert decoded(both.tokens(tokenizer), tokenizer) == ["first\n\nsecond", *odd]


def test_empty_documents_are_no_samples(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = ["", "  \n", "something", "\t", "more"]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    assert decoded(files(path, num_samples=2).tokens(tokenizer), tokenizer) == ["something", "more"]
    with pytest.raises(UserError, match="holds only 2 documents with text; ask for fewer"):
        files(path, num_samples=3).tokens(tokenizer)


def test_a_local_folder_of_the_hubs_layout(tokenizer: Any, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "mine"
    (folder / "data").mkdir(parents=True)
    for split, rows in {"train": ROWS, "test": ROWS[:2]}.items():
        table = pyarrow.table({"text": rows, "answer": [row[0] for row in rows]})
        pyarrow.parquet.write_table(table, folder / "data" / f"{split}-00000-of-00001.parquet")
    source = HubDataset(12, 64, path=str(folder))
    assert decoded(source.tokens(tokenizer), tokenizer) == ROWS
    test = HubDataset(2, 64, path=str(folder), split="test", template="{text}: {answer}")
    assert decoded(test.tokens(tokenizer), tokenizer) == [f"{row}: d" for row in ROWS[:2]]
    for wrong in (dict(field="texts"), dict(template="{question}")):
        with pytest.raises(UserError, match=r"\['answer', 'text'\]"):
            HubDataset(1, 64, path=str(folder), **wrong).tokens(tokenizer)
    with pytest.raises(UserError, match="could not be loaded"):
        HubDataset(1, 64, path=str(tmp_path / "nothing")).tokens(tokenizer)


class Endless(Texts):
    """Documents that all say the same, without end."""

    def documents(self) -> Any:
        while True:
            yield f"sample of length {self.max_length}"


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
        StandardLibrary(10_000_000, 8).tokens(lambda group, **_: {"input_ids": [(1, 2)] * 64})
