"""Results remembered on disk by what they depend on: outputs/store/<kind>/<key>/.

A result is done when its artifact.json exists, which is written last, with the size and sha256 of
every other file. A result that no longer is what it says is set aside and made again. Jobs that ask
for the same result at the same time wait for one computation; a killed one leaves its partial files
for the next attempt. By hand: no cache library keys a result by what it depends on, or resumes one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from moe_lab import processes
from moe_lab.files import MODEL_CARD
from moe_lab.integrity import (
    PARTIAL,
    SUM,
    damage,
    flush,
    seal,
    sum_of_record,
    with_sum,
    write_whole,
)
from moe_lab.locks import locked
from moe_lab.provenance import commit, versions
from moe_lab.types import UserError

logger = logging.getLogger(__name__)

DONE = "artifact.json"
FILES = "files"  # in a record: the bytes and sums of its folder's; the record's own is beside them
ASIDE = "damaged"  # what was found damaged: <key>.damaged-<number>, its record damaged.json
KEY_LENGTH = 12


@dataclass(frozen=True)
class Artifact:
    """A finished result.

    cached: it was there already; seconds: what making it took (its last attempt), then or now.
    """

    kind: str
    key: str
    folder: Path
    cached: bool
    seconds: float


class Store:
    """Finished results under one root folder, made at most once each."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def find(self, kind: str, identity: Mapping[str, Any]) -> Artifact | None:
        """The result for `identity` where it is finished and undamaged, else None.

        Several processes get the same answer, the main one's.
        """
        return processes.broadcast(self._find(kind, identity) if processes.is_main() else None)

    def _find(self, kind: str, identity: Mapping[str, Any]) -> Artifact | None:
        key = key_of(identity)
        folder = self.root / kind / key
        try:
            wrong = _damage_once(folder)
            seconds = None if wrong else float(read_record(folder)["seconds"])
        except FileNotFoundError:  # not there, or another job sets it aside just now
            return None
        return None if seconds is None else Artifact(kind, key, folder, True, seconds)

    def get(
        self,
        kind: str,
        identity: Mapping[str, Any],
        make: Callable[[Path], None],
        together: bool = False,
    ) -> Artifact:
        """The result for `identity`, made by `make(folder)` unless it is there.

        The folder outlives a killed or failed attempt, so `make` may resume from what lies in it.
        A damaged result is set aside (warned of), and made from nothing.
        With several processes the main one makes it while the others wait; together: all of them
        do, in the same folder, and the main one seals it. All get the same.
        Raises whatever `make` raises, TypeError for an identity that is not JSON, and UserError
        when the disk is full.
        """
        if artifact := self.find(kind, identity):
            return artifact
        folder = self.root / kind / key_of(identity)
        if not processes.is_main():
            return _beside(make, together)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_suffix(".lock"), f"{kind}/{folder.name}"):
            artifact = self._find(kind, identity)  # another job may have made it meanwhile
            if artifact is None:
                artifact = _made(folder, kind, identity, make, together)
            elif together:
                processes.broadcast(None)
        return processes.broadcast(artifact)


def read_record(folder: Path) -> dict[str, Any]:
    """What artifact.json says of a finished result; ValueError where it is not as it was written.

    FileNotFoundError where the result is not finished.

    Those from before records had a sum of their own, or of their folder's files, are taken as read.
    """
    try:
        record: dict[str, Any] = json.loads((folder / DONE).read_text(encoding="utf-8"))
        told = record.pop(SUM, None)
        if told != sum_of_record(record) and (told or FILES in record):
            raise ValueError("it has changed since it was written (another sha256)")
        if not isinstance(record["seconds"], (int, float)) or record["key"] != folder.name:
            raise ValueError(f"it is that of {record['key']}")
    except FileNotFoundError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{DONE} cannot be read: {error}") from error
    return record


def damage_of(folder: Path, quick: bool = True) -> str | None:
    """What is wrong with a finished result, in words; None where nothing is, or it is unfinished.

    quick: as of `integrity.damage`.
    """
    if not (folder / DONE).exists():
        return None
    try:
        return damage(folder, read_record(folder).get(FILES, {}), quick)
    except ValueError as error:
        return str(error)


def check_undamaged(folder: Path) -> None:
    """Refuse a folder within a result of a store (its checkpoint) that is not what was written."""
    if wrong := damage_of(folder.resolve().parent):
        raise UserError(
            f"{folder} is damaged: {wrong}. The run that made it, started again, makes it anew"
        )


def set_aside(folder: Path) -> Path:
    """Move a damaged result out of the way, to be looked at; where it lies now.

    Its record goes first, so that no moment has a finished result that is damaged. The caller holds
    its lock.
    """
    os.replace(folder / DONE, folder / f"{ASIDE}.json")
    numbers = range(1, len(list(folder.parent.iterdir())) + 2)
    places = (folder.with_name(f"{folder.name}.{ASIDE}-{number}") for number in numbers)
    aside = next(place for place in places if not place.exists())
    os.replace(folder, aside)
    return aside


def canonical(identity: Mapping[str, Any]) -> str:
    """The identity as JSON that does not depend on the order of keys, nor on 1 against 1.0.

    Raises TypeError, naming the key, for anything that JSON cannot say (a path, a tensor, NaN).
    """
    return json.dumps(_plain(dict(identity), "identity"), sort_keys=True, separators=(",", ":"))


def key_of(identity: Mapping[str, Any]) -> str:
    """The 12 hexadecimal digits under which the result for `identity` is stored."""
    return _digest(canonical(identity))


def check_writable(root: Path, needed_bytes: int) -> None:
    """Refuse an output folder that cannot be written or has too little space, before any work.

    Creates the folder where it is missing. Raises UserError with the numbers and the way out.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=root, suffix=PARTIAL) as probe:
            probe.write(b"moe_lab")
            probe.flush()
    except OSError as error:
        raise UserError(
            f"cannot write results to {root}: {error.strerror}. "
            "Choose a folder you may write to: store=<folder>"
        ) from error
    free = shutil.disk_usage(root).free
    if free < needed_bytes:
        raise UserError(
            f"this run needs about {needed_bytes / 2**30:.2f} GiB under {root}, "
            f"but its disk has {free / 2**30:.2f} GiB free. "
            "Free some space, or choose another disk: store=<folder>"
        )


def _plain(value: object, where: str) -> Any:
    """`value` with whole floats as integers, refusing what JSON cannot say."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return int(value) if value.is_integer() else value
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    raise TypeError(
        f"{where} is {value!r} ({type(value).__name__}); an identity holds only dict with text "
        "keys, list, str, int, finite float, bool and None"
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


def _made(
    folder: Path,
    kind: str,
    identity: Mapping[str, Any],
    make: Callable[[Path], None],
    together: bool,
) -> Artifact:
    """A result made in the main process, which holds its lock."""
    if wrong := damage_of(folder):
        aside = set_aside(folder)
        logger.warning(
            "%s/%s in the store is damaged: %s. It is made again; what was there lies in "
            "%s", kind, folder.name, wrong, aside,
        )  # fmt: skip
    folder.mkdir(exist_ok=True)
    started = time.perf_counter()
    with _disk_full_explained(folder):
        if together:
            processes.broadcast(folder)
            make(folder)
            processes.wait()
        else:
            with processes.alone():
                make(folder)
        seconds = time.perf_counter() - started
        _mark_done(folder, kind, folder.name, identity, seconds)
    return Artifact(kind, folder.name, folder, cached=False, seconds=seconds)


def _beside(make: Callable[[Path], None], together: bool) -> Artifact:
    """The same in another process, which holds no lock and waits for the main one."""
    folder: Path | None = processes.broadcast(None) if together else None
    if folder is not None:
        with _disk_full_explained(folder):
            make(folder)
            processes.wait()
    return processes.broadcast(cast(Artifact, None))


_undamaged: dict[Path, tuple[int, int]] = {}  # looked at in this process, by their records' files


def _damage_once(folder: Path) -> str | None:
    """`damage_of` a result when this process first asks for it, and whenever it is another."""
    file = (folder / DONE).stat()
    seen, now = _undamaged.get(folder.resolve()), (file.st_ino, file.st_mtime_ns)
    if seen == now:
        return None
    wrong = damage_of(folder)
    if wrong is None:
        _undamaged[folder.resolve()] = now
    return wrong


def _mark_done(
    folder: Path, kind: str, key: str, identity: Mapping[str, Any], seconds: float
) -> None:
    for left in folder.rglob(f"*{PARTIAL}"):  # by an attempt that was killed while it wrote
        left.unlink()
    record = {
        "kind": kind,
        "key": key,
        "identity": _plain(dict(identity), "identity"),
        "commit": commit(),
        "versions": versions(),
        "seconds": round(seconds, 3),
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        FILES: seal(folder, without=(DONE, MODEL_CARD)),
    }
    write_whole(folder / DONE, json.dumps(with_sum(record), indent=2) + "\n")
    flush(folder.parent)


@contextmanager
def _disk_full_explained(folder: Path) -> Iterator[None]:
    """Turn a full disk, however a library words it, into the user's message."""
    try:
        yield
    except Exception as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(
            error
        )
        if not full:
            raise
        free = shutil.disk_usage(folder).free
        raise UserError(
            f"the disk of {folder} is full ({free / 2**30:.2f} GiB free). Everything finished "
            "before is kept: free some space and start again, or use store=<folder> elsewhere"
        ) from error
