"""Whether files are still what was written: sizes and sha256 sums, and the flush to disk before.

By hand: the formats that results are kept in (safetensors, JSON) have no checksums.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# What is hashed without being asked: well under a second, at 0.4 GB/s without the CPU's help.
QUICK_BYTES = 256 * 2**20
SUM = "sha256"  # what the sum is called wherever it is kept
PARTIAL = ".partial"  # ends the names of files that are being written
Seals = Mapping[str, Mapping[str, Any]]  # by a file's name in its folder: its bytes and sha256


def seal(folder: Path, without: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """Flush all files below a folder to disk; their bytes and sha256, by their names in it.

    without: names of files that belong to nobody's result. Raises OSError where the disk does.
    """
    files = [file for file in _files(folder) if file.name not in without]
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        seals = list(pool.map(seal_of, files))
    for place in {file.parent for file in files} | {folder}:
        flush(place)
    names = (file.relative_to(folder).as_posix() for file in files)
    return dict(zip(names, seals, strict=True))


def seal_of(file: Path) -> dict[str, Any]:
    """Flush one file to disk; its bytes and sha256."""
    flush(file)
    return {"bytes": file.stat().st_size, SUM: sha256_of(file)}


def damage(folder: Path, seals: Seals, quick: bool = True) -> str | None:
    """What is missing, torn or changed of the sealed files, the first such in words; else None.

    quick: sizes of all, but sums only of the smallest files, QUICK_BYTES together.
    """
    hashed = 0
    for name, told in sorted(seals.items(), key=lambda item: item[1]["bytes"]):
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if (size := file.stat().st_size) != told["bytes"]:
            return f"{name} has {size:,} bytes instead of {told['bytes']:,}"
        hashed += size
        if (not quick or hashed <= QUICK_BYTES) and sha256_of(file) != told[SUM]:
            return f"{name} has changed since it was written (another sha256)"
    return None


def sha256_of(file: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def with_sum(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record that is to be kept as JSON, with the sum of its own values under SUM."""
    return dict(record) | {SUM: sum_of_record(record)}


def without_sum(record: dict[str, Any]) -> dict[str, Any]:
    """A record as it was before `with_sum`; ValueError where it has changed since."""
    if record.pop(SUM, None) != sum_of_record(record):
        raise ValueError("it has changed since it was written (another sha256)")
    return record


def sum_of_record(record: Mapping[str, Any]) -> str:
    """The sha256 of a record that is kept as JSON, which has it under SUM beside its own values."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def flush(path: Path) -> None:
    """Have a file's bytes, or a folder's list of names, outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that it is there in full or not at all, also after a power cut."""
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    partial.write_text(text, encoding="utf-8")
    put_in_place(partial, path)


def put_in_place(partial: Path, path: Path) -> None:
    """Have a file that is written become `path`: in full or not at all, also after a power cut."""
    flush(partial)
    os.replace(partial, path)
    flush(path.parent)


def _files(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.rglob("*")):
        if file.is_file() and not file.name.endswith(PARTIAL):
            yield file
