"""Text from files: JSON lines, parquet and plain text read alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from documents import ROWS, decoded, files


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
