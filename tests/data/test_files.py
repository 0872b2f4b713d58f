"""Text from files: JSON lines, parquet and plain text read alike."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from documents import ROWS, decoded, files

from moe_lab.types import UserError


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


KINDS = ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "rows.jsonl.gz", "rows.csv.zst"]


@pytest.mark.parametrize("name", KINDS)
def test_rows_without_text_are_left_out_alike(
    name: str, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Null, empty and blank: not taken, counted, and said, also where nothing else is left."""
    path = tmp_path / name
    write(path, [None, "one", "", "two", " \t\n"])
    with caplog.at_level("INFO"):
        found = files(path, num_samples=2).tokens(tokenizer)
    assert decoded(found, tokenizer) == ["one", "two"]
    assert f"{path}: left out were 3 rows without text (null, empty or blank)" in caplog.text
    with pytest.raises(UserError, match=r"holds only 2 documents.*left out were 3 rows without"):
        files(path, num_samples=3).tokens(tokenizer)
    write(path, [None, "", " "])
    with pytest.raises(UserError, match=r"only 0 documents.*give more text; left out were 3 rows"):
        files(path, num_samples=1).tokens(tokenizer)


@pytest.mark.parametrize("name", KINDS)
def test_a_column_that_is_not_there(name: str, tokenizer: Any, tmp_path: Path) -> None:
    write(tmp_path / name, ["one"], column="body")
    with pytest.raises(UserError, match=r"has no field 'text' \(there is \['body', 'number'"):
        files(tmp_path / name, num_samples=1).tokens(tokenizer)
    found = files(tmp_path / name, num_samples=1, field="body").tokens(tokenizer)
    assert decoded(found, tokenizer) == ["one"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, r"line 2: the field 'text' holds 3 \(int\), and is to hold text or messages"),
        (True, r"holds True \(bool\)"),
        ({"a": 1}, r"holds \{'a': 1\} \(dict\)"),
        (["a"], "item 1 is no message with role and content: 'a'"),
        ("a\ud800b", r"line 2: its text has a lone surrogate, '\\ud800' behind 'a'"),
        ("\udc00", "lone surrogate"),
        ("x" * 50 + "\udfff", "lone surrogate.*behind 'x{20}'"),
    ],
)
def test_values_that_are_no_text(value: Any, message: str, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "fine"}) + "\n" + json.dumps({"text": value}) + "\n")
    with pytest.raises(UserError, match=message):
        files(path, num_samples=2).tokens(tokenizer)
    if isinstance(value, str):
        with pytest.raises(UserError, match=message):
            files(path, num_samples=2, template="{text}").tokens(tokenizer)


def test_the_fingerprint_follows_what_is_said_and_not_where(tokenizer: Any, tmp_path: Path) -> None:
    prints = set()
    for name in KINDS:
        write(tmp_path / name, ["one", "two"])
        prints.add(files(tmp_path / name, num_samples=2).tokens(tokenizer).fingerprint)
    assert len(prints) == 1
    write(tmp_path / "rows.csv", ["one", "tw0"])
    assert files(tmp_path / "rows.csv", num_samples=2).tokens(tokenizer).fingerprint not in prints


def write(path: Path, texts: list[Any], column: str = "text") -> None:
    """Rows with a text and a number, as the file's ending says."""
    import pyarrow
    import pyarrow.parquet

    rows = [{column: text, "number": number} for number, text in enumerate(texts)]
    kind, _, packed = path.name.partition(".")[2].partition(".")
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return
    if kind == "csv":
        made = io.StringIO()
        csv.writer(made).writerows([[column, "number"], *(list(row.values()) for row in rows)])
        text = made.getvalue()
    else:
        text = json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows))
    with (
        pyarrow.CompressedOutputStream(str(path), {"gz": "gzip", "zst": "zstd"}[packed])
        if (packed)
        else path.open("wb") as file
    ):
        file.write(text.encode())
