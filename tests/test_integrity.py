"""Sizes and sums of files, against hashlib and a look at each byte."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from moe_lab.integrity import damage, flush, seal, with_sum, without_sum


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in" / "ner").mkdir(parents=True)
    (tmp_path / "in" / "ner" / "weights").write_bytes(b"w" * 1000)
    (tmp_path / "plan.json").write_bytes(b"{}")
    (tmp_path / "done.json").write_bytes(b"[]")
    (tmp_path / "half.safetensors.partial").write_bytes(b"x")
    return tmp_path


def test_every_file_is_sealed_by_name(folder: Path) -> None:
    assert seal(folder, without=["done.json"]) == {
        "in/ner/weights": {"bytes": 1000, "sha256": hashlib.sha256(b"w" * 1000).hexdigest()},
        "plan.json": {"bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()},
    }


def test_undamaged_is_nothing(folder: Path) -> None:
    assert damage(folder, seal(folder)) is None


def test_every_flipped_bit_is_found(folder: Path) -> None:
    seals, file = seal(folder), folder / "in" / "ner" / "weights"
    whole = file.read_bytes()
    for place in (0, 1, 499, 999):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        file.write_bytes(flipped)
        told = damage(folder, seals)
        assert told == "in/ner/weights has changed since it was written (another sha256)"


def test_size_and_absence_are_told(folder: Path) -> None:
    seals = seal(folder)
    (folder / "in" / "ner" / "weights").write_bytes(b"w" * 999)
    assert damage(folder, seals) == "in/ner/weights has 999 bytes instead of 1,000"
    (folder / "in" / "ner" / "weights").unlink()
    assert damage(folder, seals) == "in/ner/weights is missing"


def test_flush_takes_files_and_folders(folder: Path) -> None:
    flush(folder)
    flush(folder / "plan.json")
    with pytest.raises(FileNotFoundError):
        flush(folder / "absent")


def test_a_record_proves_itself() -> None:
    record = {"files": {"a": 1}, "at": [2, None]}
    kept = with_sum(record)
    assert record == without_sum(dict(kept)) and kept.keys() - record.keys() == {"sha256"}
    for changed in (kept | {"at": [3, None]}, kept | {"more": 0}, record, {}):
        with pytest.raises(ValueError, match="it has changed since it was written"):
            without_sum(dict(changed))
