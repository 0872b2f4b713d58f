"""Results remembered on disk by what they depend on: outputs/store/<kind>/<key>/.

A result is done when its artifact.json exists, which is written last. Jobs that ask for the same
result at the same time wait for one computation; a killed one leaves its partial files for the
next attempt. By hand: no cache library keys a result by what it depends on, or resumes one.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from moe_lab.types import UserError

logger = logging.getLogger(__name__)

DONE = "artifact.json"
KEY_LENGTH = 12
VERSIONED = ("torch", "transformers", "lm_eval", "moe_lab")


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
        """The result for `identity` where it is finished, else None."""
        key = key_of(identity)
        folder = self.root / kind / key
        seconds = _seconds_if_done(folder)
        if seconds is None:
            return None
        return Artifact(kind, key, folder, cached=True, seconds=seconds)

    def get(self, kind: str, identity: Mapping[str, Any], make: Callable[[Path], None]) -> Artifact:
        """The result for `identity`, made by `make(folder)` unless it is there.

        The folder outlives a killed or failed attempt, so `make` may resume from what lies in it.
        Raises whatever `make` raises, TypeError for an identity that is not JSON, and UserError
        when the disk is full.
        """
        if artifact := self.find(kind, identity):
            return artifact
        key = key_of(identity)
        folder = self.root / kind / key
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock"), f"{kind}/{key}"):
            if artifact := self.find(kind, identity):  # another job may have made it meanwhile
                return artifact
            folder.mkdir(exist_ok=True)
            started = time.perf_counter()
            with _disk_full_explained(folder):
                make(folder)
                seconds = time.perf_counter() - started
                _mark_done(folder, kind, key, identity, seconds)
        return Artifact(kind, key, folder, cached=False, seconds=seconds)


def canonical(identity: Mapping[str, Any]) -> str:
    """The identity as JSON that does not depend on the order of keys, nor on 1 against 1.0.

    Raises TypeError, naming the key, for anything that JSON cannot say (a path, a tensor, NaN).
    """
    return json.dumps(_plain(dict(identity), "identity"), sort_keys=True, separators=(",", ":"))


def key_of(identity: Mapping[str, Any]) -> str:
    """The 12 hexadecimal digits under which the result for `identity` is stored."""
    return _digest(canonical(identity))


@functools.cache
def commit() -> str:
    """The git commit of the checkout this code runs from.

    "+dirty" is appended where tracked or new files differ; "unknown" outside a checkout.
    """
    checkout = Path(__file__).resolve().parents[1]
    top = _git(checkout, "rev-parse", "--show-toplevel")
    head = _git(checkout, "rev-parse", "HEAD")
    if not top or not head or Path(top).resolve() != checkout:
        return "unknown"
    return f"{head}+dirty" if _git(checkout, "status", "--porcelain") else head


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on, read from their metadata."""
    by_name = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            by_name[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            by_name[name] = "not installed"
    return by_name


def check_writable(root: Path, needed_bytes: int) -> None:
    """Refuse an output folder that cannot be written or has too little space, before any work.

    Creates the folder where it is missing. Raises UserError with the numbers and the way out.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=root, suffix=".partial") as probe:
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


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that it is there in full or not at all, also after a power cut."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


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


def _git(folder: Path, *arguments: str) -> str:
    """Git's answer, or an empty string where there is no git or no repository."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return answer.stdout.strip()


def _seconds_if_done(folder: Path) -> float | None:
    """How long a finished result took to make; None while it is not finished."""
    path = folder / DONE
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["seconds"])
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        logger.warning("%s cannot be read (%r): making this result again", path, error)
        return None


def _mark_done(
    folder: Path, kind: str, key: str, identity: Mapping[str, Any], seconds: float
) -> None:
    record = {
        "kind": kind,
        "key": key,
        "identity": _plain(dict(identity), "identity"),
        "commit": commit(),
        "versions": versions(),
        "seconds": round(seconds, 3),
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_whole(folder / DONE, json.dumps(record, indent=2) + "\n")


@contextmanager
def _locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path`; the kernel frees it when its holder dies."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("waiting for another job that is making %s (%s)", what, path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


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
