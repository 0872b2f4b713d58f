"""The sha256 of a checkpoint's files: several at a time, large ones remembered from job to job.

A file is the one that was read before while its path, its size and the times of its last write and
its last change are the same; no program can set the latter. By hand: what else remembers so (git,
DVC) does it for files that it keeps itself.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from moe_lab.integrity import sha256_of, with_sum, without_sum, write_whole
from moe_lab.progress import progress

REMEMBERED = 2**26  # bytes from which on a file is remembered: what is smaller is read in a moment
WITH_PROGRESS = 2**31  # bytes together from which on it is shown how far reading is
SETTLED = 2.0  # seconds: a file written less long ago may be written again at the same time

logger = logging.getLogger(__name__)

_memory: Path | None = None


def remember_in(store: Path) -> None:
    """Have a store's folder, which need not be there, hold what is read of large files from now."""
    global _memory
    _memory = store / "sums"


def sha256_sums(files: Sequence[Path]) -> list[str]:
    """The sha256 of files, in hexadecimal digits."""
    found = {file: known for file in files if (known := _known(file))}
    left = [file for file in dict.fromkeys(files) if file not in found]
    with ThreadPoolExecutor(min(len(left), os.cpu_count() or 1) or 1) as pool:
        read: Iterable[str] = pool.map(_read, left)  # hashing lets other threads run
        if sum(file.stat().st_size for file in left) >= WITH_PROGRESS:
            read = progress(read, "sha256 of the weights", len(left))
        found |= dict(zip(left, read, strict=True))
    return [found[file] for file in files]


def unread_bytes(files: Iterable[Path]) -> int:
    """How many bytes of files have to be read for their sums."""
    return sum(file.stat().st_size for file in files if not _known(file))


def _known(file: Path) -> str | None:
    """The sum of a file, where nothing of it needs to be read."""
    blob = Path(os.path.realpath(file))
    if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name):
        return blob.name  # a hub cache calls its files so
    place = _place(blob)
    if place is None:
        return None
    try:
        record = without_sum(json.loads(place.read_text(encoding="utf-8")))
        known: str = record.pop("content")
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None  # then it is read, and written anew
    return known if record == _seen(blob) else None


def _read(file: Path) -> str:
    """The sum of a file, by reading it; remembered where it is the same file then as before."""
    blob = Path(os.path.realpath(file))
    before, started = _seen(blob), time.time_ns()
    found = sha256_of(blob)
    place = _place(blob)
    newest = max(before["written"], before["changed"])
    if place and before == _seen(blob) and started - newest > SETTLED * 1e9:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            record = before | {"content": found}
            write_whole(place, json.dumps(with_sum(record)))
        except OSError as error:
            logger.info("%s: its sha256 is not remembered: %s", blob, error)
    return found


def _place(blob: Path) -> Path | None:
    """Where a file is remembered, if it is to be."""
    if _memory is None or blob.stat().st_size < REMEMBERED:
        return None
    return _memory / f"{hashlib.sha256(str(blob).encode()).hexdigest()[:12]}.json"


def _seen(blob: Path) -> dict[str, Any]:
    """What tells a file from one that was there before; times in nanoseconds."""
    told = blob.stat()
    return {
        "path": str(blob),
        "bytes": told.st_size,
        "written": told.st_mtime_ns,
        "changed": told.st_ctime_ns,
    }
