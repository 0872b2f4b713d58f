"""Rows of one file, each with the place where it stands: JSON, CSV, Parquet and plain text.

All but Parquet may be packed (.gz, .zst, .bz2, .xz) and begin with a byte order mark. What cannot
be read is a UserError that names file, line and value.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from moe_lab.types import UserError

PlacedRow = tuple[str, Any]  # where it stands, for messages, and what is there
JSON_ENDINGS, DELIMITERS = (".jsonl", ".ndjson", ".json"), {".csv": ",", ".tsv": "\t"}
MARK, UTF_16 = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")
MOST_SHOWN = 60  # characters of a value in a message
DAMAGED = (OSError, ValueError, EOFError, zlib.error, lzma.LZMAError)  # of files, as libraries say


def _open_zstd(path: Path) -> IO[bytes]:
    import pyarrow

    stream: Any = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
    return io.BufferedReader(stream)


PACKED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open, ".zst": _open_zstd, ".bz2": bz2.open, ".xz": lzma.open,
}  # fmt: skip


def file_rows(path: Path, field: str) -> Iterator[PlacedRow]:
    """The rows of a file, by its ending; plain text is one row, whose `field` is all of it."""
    _check(path)
    packed = path.suffix.lower() in PACKED
    kind = Path(path.stem if packed else path.name).suffix.lower()
    try:
        if kind == ".parquet":
            yield from _of_parquet(path)
        elif kind in JSON_ENDINGS:
            yield from _of_json(path)
        elif kind in DELIMITERS:
            yield from _of_csv(path, DELIMITERS[kind])
        else:
            whole = "".join(line for _, line in _lines(path))
            yield str(path), {field: whole.replace("\r\n", "\n").replace("\r", "\n")}
    except UserError:
        raise
    except DAMAGED as error:
        raise UserError(f"{path} cannot be read: {error}; is all of it there?") from error


def excerpt(value: object) -> str:
    """A value as a message has it: in one line, and not all of a long one."""
    text = ascii(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}…"


def check_text(text: str, place: str) -> str:
    """The text; UserError where JSON's \\uXXXX gave it half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{place}: its text has a lone surrogate, {text[error.start]!a} behind "
            f"{excerpt(text[max(0, error.start - 20) : error.start])}: half of a character, which "
            "no tokenizer takes; correct it, or leave the row out"
        ) from error
    return text


def _check(path: Path) -> None:
    if path.is_dir():
        inside = sorted(one.name for one in path.iterdir() if one.is_file())[:3]
        example = f"{path}/{inside[0]}" if inside else f"{path}/a.jsonl"
        raise UserError(
            f"{path} is a folder, not a file: name its files, as calibration.files=['{example}']"
        )
    if not path.is_file():
        raise UserError(f"{path} is not a file (calibration.files)")
    if not path.stat().st_size:
        raise UserError(f"{path} is empty (0 bytes): give a file with text, or leave it out")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines and their numbers; not str.splitlines, which also splits inside a JSON string."""
    opened = PACKED.get(path.suffix.lower())
    with opened(path) if opened else path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            yield number, _decoded(raw.removeprefix(MARK) if number == 1 else raw, path, number)


def _decoded(raw: bytes, path: Path, number: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        looks = " (this looks like UTF-16)" if number == 1 and raw.startswith(UTF_16) else ""
        raise UserError(
            f"{path}, line {number}, cannot be read as UTF-8: byte 0x{raw[error.start]:02x} behind "
            f"{excerpt(raw[: error.start][-20:].decode())}{looks}; save the file as UTF-8"
        ) from error


def _of_json(path: Path) -> Iterator[PlacedRow]:
    """JSON lines, or one array of all rows."""
    lines, found = _lines(path), False
    for number, line in lines:
        if not found and line.lstrip().startswith("["):
            text = "".join(itertools.chain([line], (more for _, more in lines)))
            for item, row in enumerate(_json(text, path, number), start=1):
                yield f"{path}, item {item}", row
        else:
            found = found or bool(line.strip())
            # A blank line is a row without text, as it is in a CSV file.
            yield (
                f"{path}, line {number}",
                _json(line.rstrip(), path, number) if line.strip() else None,
            )


def _json(text: str, path: Path, number: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at, line = number + error.lineno - 1, text.splitlines()[error.lineno - 1 :][:1]
        said = f"line {at} is not JSON ({error.msg}): {excerpt(line[0] if line else '')}"
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 5,000 brackets
        said = f"line {number} is not JSON that can be read ({error})"
    raise UserError(f"{path}, {said}; JSON has one object a line, or is one array of all")


def _of_csv(path: Path, delimiter: str) -> Iterator[PlacedRow]:
    """Rows by the names in the head; a blank line is one without text."""
    csv.field_size_limit(sys.maxsize)  # else a text of 131,072 characters is an error
    reader = csv.reader((line for _, line in _lines(path)), delimiter=delimiter, strict=True)
    begins = 1
    try:
        head = next(reader, [])
        if len(set(head)) < len(head):
            raise UserError(f"{path}, line 1: two columns have one name in {excerpt(head)}")
        begins = reader.line_num + 1
        for cells in reader:
            place = f"{path}, line {begins}"
            if cells and len(cells) != len(head):
                raise UserError(
                    f"{place}, has {len(cells)} cells, and the head {len(head)} columns "
                    f"{excerpt(head)}: text with a {delimiter!r} stands in double quotes"
                )
            yield place, dict(zip(head, cells, strict=True)) if cells else None
            begins = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path}, line {begins}, is no CSV ({error}): text with quotes stands in double "
            'quotes, each quote in it doubled ("")'
        ) from error


def _of_parquet(path: Path) -> Iterator[PlacedRow]:
    import pyarrow.parquet

    if path.suffix.lower() in PACKED:
        raise UserError(f"{path}: Parquet is packed by itself, unpack the file once")
    begins = 1
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
        for row, value in enumerate(_values(batch, path, begins), start=begins):
            yield f"{path}, row {row}", value
        begins += batch.num_rows


def _values(batch: Any, path: Path, begins: int) -> list[Any]:
    try:
        values: list[Any] = batch.to_pylist()
        return values
    except UnicodeDecodeError as error:
        for row in range(batch.num_rows):
            try:
                batch.slice(row, 1).to_pylist()
            except UnicodeDecodeError:
                raise UserError(
                    f"{path}, row {begins + row}, cannot be read as UTF-8: {error.reason}"
                ) from error
        raise
