"""Sums of weight files: those of the bytes, and none of a file that is another one by now."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path

import pytest

from moe_lab.models import file_sums
from moe_lab.models.file_sums import remember_in, sha256_sums, unread_bytes


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of any size are remembered, however young they are."""
    monkeypatch.setattr(file_sums, "_memory", None)
    monkeypatch.setattr(file_sums, "REMEMBERED", 1)
    monkeypatch.setattr(file_sums, "SETTLED", -1e9)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    made = [tmp_path / f"{number}.safetensors" for number in range(5)]
    for number, file in enumerate(made):
        file.write_bytes(bytes([number]) * (1000 + number))
    return made


def plain(files: list[Path]) -> list[str]:
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: Path) -> str:
        raise AssertionError(f"{file} is read")

    monkeypatch.setattr(file_sums, "sha256_of", refuse)


def test_they_are_of_the_bytes_in_the_order_of_the_files(files: list[Path]) -> None:
    assert sha256_sums([]) == []
    assert sha256_sums([*files, files[0]]) == plain([*files, files[0]])


def test_what_was_read_is_not_read_again(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remember_in(tmp_path / "store")
    assert unread_bytes(files) == 5 * 1000 + 10
    expected = sha256_sums(files)
    link = tmp_path / "link.safetensors"
    link.symlink_to(files[1])
    unreadable(monkeypatch)
    assert sha256_sums([*files, link]) == [*expected, expected[1]] == plain([*files, link])
    assert unread_bytes(files) == 0
    remember_in(tmp_path / "another")
    with pytest.raises(AssertionError, match="is read"):
        sha256_sums(files)


def test_a_file_that_was_changed_is_read_also_with_its_old_size_and_time(
    files: list[Path], tmp_path: Path
) -> None:
    remember_in(tmp_path / "store")
    sha256_sums(files)
    before = files[2].stat()
    with files[2].open("r+b") as opened:
        opened.write(b"x")
    os.utime(files[2], ns=(before.st_atime_ns, before.st_mtime_ns))
    assert files[2].stat().st_mtime_ns == before.st_mtime_ns
    os.replace(files[3], files[4])
    left = [*files[:3], files[4]]
    assert unread_bytes(left) == 1002 + 1003
    assert sha256_sums(left) == plain(left)


@pytest.mark.parametrize("damage", ["", "{}", "[]", "null", '{"sha256": 3}', "other"])
def test_a_memory_that_is_damaged_is_none(damage: str, files: list[Path], tmp_path: Path) -> None:
    remember_in(tmp_path / "store")
    expected = sha256_sums(files)
    memories = sorted((tmp_path / "store" / "sums").iterdir())
    assert len(memories) == len(files)
    for memory in memories:
        told = json.loads(memory.read_text())
        memory.write_text(damage if damage != "other" else json.dumps(told | {"content": "0" * 64}))
    assert sha256_sums(files) == expected
    assert all(json.loads(one.read_text())["content"] in expected for one in memories)


def test_young_files_and_small_ones_are_not_remembered(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remember_in(tmp_path / "store")
    monkeypatch.setattr(file_sums, "SETTLED", 1000.0)
    sha256_sums(files)
    monkeypatch.setattr(file_sums, "SETTLED", -1e9)
    monkeypatch.setattr(file_sums, "REMEMBERED", 2000)
    sha256_sums(files)
    assert not (tmp_path / "store").exists()


def test_a_file_that_changes_while_it_is_read_is_not_remembered(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_and_change(file: Path) -> str:
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        file.write_bytes(b"another")
        return found

    remember_in(tmp_path / "store")
    monkeypatch.setattr(file_sums, "sha256_of", read_and_change)
    sha256_sums(files)
    assert not (tmp_path / "store").exists()


def test_where_nothing_can_be_kept_files_are_read_and_that_is_said(
    files: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "store").write_text("a file")
    remember_in(tmp_path / "store")
    with caplog.at_level(logging.INFO):
        assert sha256_sums(files) == plain(files)
    assert caplog.text.count("its sha256 is not remembered") == len(files)


def test_a_hub_cache_says_it_by_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blob = tmp_path / "blobs" / ("a" * 64)
    blob.parent.mkdir()
    blob.write_bytes(b"weights")
    link = tmp_path / "model.safetensors"
    link.symlink_to(blob)
    unreadable(monkeypatch)
    assert sha256_sums([link]) == ["a" * 64]
    assert unread_bytes([link]) == 0
