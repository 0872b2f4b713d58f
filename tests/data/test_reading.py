"""One file's rows: every kind, packed or not, gives the same, and says where what is wrong is."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from moe_lab.data.reading import file_rows
from moe_lab.types import UserError

TEXTS = ['one, "two"', "three\nlines\n", "日本\u2028né\x85xt", "x" * 200_000, "  last"]
BLANK = [None, "", " \t "]


def dumped(texts: list[Any]) -> str:
    return "".join(json.dumps({"text": one}, ensure_ascii=False) + "\n" for one in texts)


def as_csv(texts: list[Any], delimiter: str = ",") -> str:
    made = io.StringIO()
    writer = csv.DictWriter(made, ["id", "text"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows({"id": number, "text": one} for number, one in enumerate(texts))
    return made.getvalue()


WRITERS: dict[str, Callable[[list[Any]], str]] = {
    "a.jsonl": dumped,
    "a.NDJSON": dumped,
    "a.json": lambda texts: json.dumps([{"text": one} for one in texts], indent=1),
    "b.json": lambda texts: "\n \n" + json.dumps([{"text": one} for one in texts]),
    "a.csv": as_csv,
    "a.tsv": lambda texts: as_csv(texts, "\t"),
}


def zstd(data: bytes) -> bytes:
    packed: bytes = pyarrow.compress(data, codec="zstd", asbytes=True)
    return packed


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".zst": zstd, ".bz2": bz2.compress, ".xz": lzma.compress,
}  # fmt: skip


def texts_of(path: Path) -> list[Any]:
    return [row and row["text"] for _, row in file_rows(path, "text")]


@pytest.mark.parametrize("ending", PACKERS)
@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_gives_the_same_texts(name: str, ending: str, tmp_path: Path) -> None:
    path = tmp_path / (name + ending)
    written = WRITERS[name](TEXTS).encode()
    path.write_bytes(PACKERS[ending](written))
    found = texts_of(path)
    assert found[-len(TEXTS) :] == TEXTS and not any(found[: -len(TEXTS)])
    path.write_bytes(PACKERS[ending](b"\xef\xbb\xbf" + written))
    assert texts_of(path) == found, "with a byte order mark"


@pytest.mark.parametrize("ending", PACKERS)
def test_plain_text_is_one_row(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(PACKERS[ending](b"\xef\xbb\xbfone\r\n\r\ntwo\n"))
    assert list(file_rows(path, "body")) == [(str(path), {"body": "one\n\ntwo\n"})]


def test_places(tmp_path: Path) -> None:
    """The line on which a row begins, also behind blank lines and cells of several lines."""
    lines, table, column = tmp_path / "a.jsonl", tmp_path / "a.csv", tmp_path / "a.parquet"
    lines.write_text('{"text": "a"}\n\n{"text": "b"}\n')
    assert [place for place, row in file_rows(lines, "text") if row] == [
        f"{lines}, line 1", f"{lines}, line 3",
    ]  # fmt: skip
    table.write_text('text\n"a\nb"\n\nc\n')
    assert list(file_rows(table, "text")) == [
        (f"{table}, line 2", {"text": "a\nb"}), (f"{table}, line 4", None),
        (f"{table}, line 5", {"text": "c"}),
    ]  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x"] * 1030}), column)
    assert [place for place, _ in file_rows(column, "text")][-1] == f"{column}, row 1030"


def test_several_streams_behind_each_other_are_one_file(tmp_path: Path) -> None:
    for ending, pack in PACKERS.items():
        path = tmp_path / f"a.jsonl{ending}"
        path.write_bytes(pack(dumped(["a"]).encode()) + pack(dumped(["b"]).encode()))
        assert texts_of(path) == ["a", "b"], ending


PARQUET = io.BytesIO()
pyarrow.parquet.write_table(pyarrow.table({"text": [f"row {n}" for n in range(3000)]}), PARQUET)
PARQUET_BYTES = PARQUET.getvalue()
LINES = dumped([f"{number * 7919}" for number in range(3000)]).encode()
WRONG: dict[str, tuple[bytes, str]] = {
    "bad.jsonl": (b'{"text": "a"}\n{"text": "caf\xe9"}\n', r"line 2, .*: byte 0xe9 behind '.*caf"),
    "bad.txt": (b"one\ntwo\nthr\xffee", r"line 3, .*0xff behind 'thr'"),
    "bad.csv": (b"text\nok\nb\x80d\n", r"line 3, .*0x80 behind 'b'"),
    "bad.json": (b'[{"text":\n "\xc3("}]', r"line 2, .*0xc3"),
    "wide.txt": ("text".encode("utf-16"), r"line 1, .*UTF-16.*save the file as UTF-8"),
    "wide.csv": ("text\na\n".encode("utf-16"), "UTF-16"),
    "cut.jsonl": (b'{"text": "a"}\n{"text": "b', r"line 2 is not JSON .*'\{\"text\": \"b'"),
    "two.json": (b'[{"text": "a"}]\n[{"text": "b"}]', r"line 2 is not JSON \(Extra data\)"),
    "open.json": (b'[{"text": "a"},\n', r"line \d is not JSON"),
    "pretty.json": (b'{\n"text": "a"\n}', r"line 1 is not JSON.*one object a line"),
    "deep.jsonl": (b"[" * 100_000, "line 1 is not JSON that can be read"),
    "long.jsonl": (b'{"text": ' + b"9" * 5000 + b"}", "line 1 is not JSON that can be read"),
    "ragged.csv": (b"id,text\n1,a\n2,b,c\n", r"line 3, has 3 cells, .*2 columns \['id', 'text'\]"),
    "short.tsv": (b"id\ttext\n1\n", r"line 2, has 1 cells"),
    "open.csv": (b'text\n"never closed\n', r"line 2, is no CSV \(unexpected end of data\)"),
    "quote.csv": (b'text\n"a"b\n', "line 2, is no CSV"),
    "twice.csv": (b"text,text\na,b\n", "two columns have one name"),
    "torn.jsonl.gz": (gzip.compress(LINES)[:-100], "cannot be read: Compressed file ended"),
    "torn.jsonl.zst": (zstd(LINES)[:-100], "cannot be read: Truncated"),
    "torn.txt.bz2": (bz2.compress(LINES)[:-100], "cannot be read: Compressed file ended"),
    "torn.csv.xz": (lzma.compress(b"text\n" + LINES)[:-100], "cannot be read: Compressed"),
    "flipped.txt.gz": (gzip.compress(b"text")[:-6] + b"abcdef", "cannot be read: CRC"),
    "no.txt.gz": (b"plain text", "cannot be read: Not a gzipped file"),
    "no.jsonl.zst": (b'{"text": "a"}', "cannot be read"),
    "no.csv.bz2": (b"text\n", "cannot be read: Invalid data stream"),
    "no.txt.xz": (b"text\n", "cannot be read: Input format not supported"),
    "head.parquet": (PARQUET_BYTES[:-100], "cannot be read: .*arquet"),
    "hole.parquet": (PARQUET_BYTES[:40] + bytes(400) + PARQUET_BYTES[440:], "cannot be read"),
    "no.parquet": (b"something else", "cannot be read"),
    "packed.parquet.gz": (gzip.compress(PARQUET_BYTES), "Parquet is packed by itself"),
    **{f"empty{end}": (b"", r"is empty \(0 bytes\)")
       for end in (".txt", ".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".txt.zst")},
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name: str, tmp_path: Path) -> None:
    content, message = WRONG[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as refused:
        texts_of(tmp_path / name)
    assert name in str(refused.value) and "\n" not in str(refused.value)


def test_a_parquet_column_that_is_no_text_names_its_row(tmp_path: Path) -> None:
    column = pyarrow.array([b"fine", b"fine", b"caf\xe9"]).cast(pyarrow.string(), safe=False)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet, row 3, cannot be read as UTF-8"):
        texts_of(tmp_path / "a.parquet")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a folder, not a file.*a\.jsonl"):
        texts_of(tmp_path)
    (tmp_path / "mine.csv").write_text("text\n")
    with pytest.raises(UserError, match=r"calibration\.files=\['.*/mine\.csv'\]"):
        texts_of(tmp_path)
    with pytest.raises(UserError, match="not a file"):
        texts_of(tmp_path / "absent.csv")
