"""One process at a time, on one machine or on many that share a file system.

Where the kernel locks files, flock does it: what a dead process held is free at once. Where it does
not, or for one machine alone (NFS without its lock manager, some mounts of Lustre), each process
that wants `<name>.lock` lays a claim into the folder `<name>.lease/`: a file whose name nobody else
ever has, touched as long as its process lives. A process holds the lock if it sees no other living
claim after it laid its own; of two that come at once, both withdraw and try again, so never both
hold it. A claim whose process is gone, or that nobody has touched for `SILENCE` seconds, goes.

By hand: filelock's own leases are not taken over on file systems that cannot exchange two names,
which are the ones that also lack flock.
"""

from __future__ import annotations

import fcntl
import logging
import os
import random
import re
import secrets
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout

from moe_lab.types import UserError

logger = logging.getLogger(__name__)

HEARTBEAT = 15.0  # seconds between two touches of a claim
SILENCE = 90.0  # seconds without one, after which its process counts as dead
POLL = 0.05, 0.5  # seconds between two looks, at random between these
WAY = "MOE_LAB_LOCKS"  # in the environment: kernel or files, where the probe of a folder is wrong
WAYS = ("kernel", "files")
LEASE = ".lease"
# Mount options with which the kernel's locks are those of one machine: NFS, Lustre.
ONE_MACHINE = re.compile(r"(^|,)(nolock|local_lock=(all|flock)|localflock)(,|$)")


@dataclass(frozen=True)
class Holder:
    """A process that holds a lock, or did; started: in ticks since boot, empty where unknown.

    host: which running system and which of its spaces of process numbers, its name first.
    """

    host: str
    pid: int
    started: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host.partition('+')[0]}"

    @property
    def here(self) -> bool:
        """Whether its process number is one of this machine."""
        return self.host == this_host()

    @property
    def gone(self) -> bool:
        """Whether it is a process of this machine that has ended."""
        return self.here and _started(self.pid) != self.started

    def text(self) -> str:
        """As `read_holder` reads it; a file's name can hold it."""
        return f"{self.host}~{self.pid}~{self.started}"


def read_holder(text: str) -> Holder | None:
    """The holder that a text names; None where it names none."""
    found = re.fullmatch(r"([^~/]+)~(\d+)~(\d*)(?:~\w*)?\s*", text)
    return Holder(found[1], int(found[2]), found[3]) if found else None


def myself() -> Holder:
    """This process."""
    return Holder(this_host(), os.getpid(), _started(os.getpid()) or "")


@cache
def this_host() -> str:
    """The machine's name, its boot, and its space of process numbers (a container's is its own)."""
    boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    parts = [re.sub(r"[^\w.-]", "_", socket.gethostname())[:64]]
    with suppress(OSError):
        parts.append(boot.read_text().strip()[:8])
    with suppress(OSError):
        parts.append(str(space.stat().st_ino))
    return "+".join(parts)


def _started(pid: int) -> str | None:
    """When a process of this machine started; "" where that is not told, None where it is gone."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return None if fields[0] == "Z" else fields[19]


class Lock:
    """The right to a path, by the kernel or by a claim; held from `take` to `release`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        kernel = kernel_locks(path.parent)
        self._way: _Kernel | _Claims = _Kernel(path) if kernel else _Claims(path.with_suffix(LEASE))

    def take(self) -> bool:
        """Whether this process holds it now; False where another does."""
        return self._way.take()

    def wait(self, seconds: float = float("inf")) -> bool:
        """Take it as soon as it is free; False where it was not within these seconds."""
        end = time.monotonic() + seconds
        while not self.take():
            if time.monotonic() >= end:
                return False
            time.sleep(random.uniform(*POLL))
        return True

    def holder(self) -> Holder | None:
        """Who holds it, where that is known."""
        return self._way.holder()

    def remove(self) -> None:
        """Remove its file, while it is held: who waits for it looks for a new one."""
        self.path.unlink(missing_ok=True)

    def release(self) -> None:
        """Leave it to others."""
        self._way.release()


@contextmanager
def locked(path: Path, what: str) -> Iterator[Lock]:
    """Hold a lock, after waiting for it where another process has it, which is told."""
    lock = Lock(path)
    if not lock.take():
        logger.info("waiting for another job%s that is making %s (%s)", _by(lock), what, path)
        lock.wait()
    try:
        yield lock
    finally:
        lock.release()


@contextmanager
def taken(path: Path, patient: bool = False) -> Iterator[Lock | None]:
    """Hold a lock that is free; None where another process has it.

    patient: where that process is on another machine, wait as long as it may still count as alive
    though its machine has died.
    """
    lock = Lock(path)
    free = lock.take()
    if not free and patient and (holder := lock.holder()) and not holder.here:
        logger.info("%s is held by %s: waiting up to %.0f s for its end, or for a sign of life",
                    path, holder, SILENCE + HEARTBEAT)  # fmt: skip
        free = lock.wait(SILENCE + HEARTBEAT)
    try:
        yield lock if free else None
    finally:
        if free:
            lock.release()


def held(path: Path) -> bool:
    """Whether a living process holds a lock; also where that may not be asked."""
    return _held_by_kernel(path) or _claimed(path.with_suffix(LEASE))


def holder_of(path: Path) -> Holder | None:
    """Who holds a lock, or did last, where that is known."""
    return Lock(path).holder()


def _by(lock: Lock) -> str:
    holder = lock.holder()
    return f" ({holder})" if holder else ""


# --------------------------------------------------------------------------- the kernel's locks


class _Kernel:
    """flock; the file says who has it, for those who wait."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, FileLock(path)

    def take(self) -> bool:
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            return False
        if _claimed(self._path.with_suffix(LEASE)):  # by a machine that has no kernel's locks here
            self._lock.release()
            return False
        with suppress(OSError):  # a full disk: then nobody is told who has it
            self._path.write_text(myself().text())
        return True

    def holder(self) -> Holder | None:
        with suppress(OSError, UnicodeDecodeError):
            return read_holder(self._path.read_text())
        return None

    def release(self) -> None:
        self._lock.release()


def _held_by_kernel(path: Path) -> bool:
    if not path.is_file() or not kernel_locks(path.parent):
        return False
    try:
        with FileLock(path).acquire(timeout=0):
            return False
    except (Timeout, PermissionError):  # another's runs, which one may read: better taken as busy
        return True


def kernel_locks(folder: Path) -> bool:
    """Whether the kernel locks files of a folder, for all machines that see it.

    UserError for another word than one of `WAYS` in the environment.
    """
    asked = os.environ.get(WAY)
    if asked:
        if asked not in WAYS:
            raise UserError(f"{WAY}={asked} in the environment: it is one of {', '.join(WAYS)}")
        return asked == "kernel"
    return _probed(folder.stat().st_dev, folder)


_answers: dict[int, bool] = {}


def _probed(device: int, folder: Path) -> bool:
    if device not in _answers:
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                _answers[device] = _locks(file.fileno(), device, folder)
        except OSError:  # one may look, not write, or the disk is full: that tells nothing
            return True
    return _answers[device]


def _locks(file: int, device: int, folder: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        logger.info("the kernel does not lock files in %s (%s): %s files do", folder, error, LEASE)
        return False
    return not ONE_MACHINE.search(_mount_options(device))


def _mount_options(device: int, table: Path = Path("/proc/self/mountinfo")) -> str:
    """The options with which a file system is mounted; empty where that is not told."""
    number = f"{os.major(device)}:{os.minor(device)}"
    lines = table.read_text().splitlines() if table.is_file() else []
    mine = [line.split() for line in lines if line.split()[2] == number]
    return ",".join(f"{fields[5]},{fields[-1]}" for fields in mine)


# --------------------------------------------------------------------------- claims in files


class _Claims:
    """A folder of claims, and ours among them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mine: Path | None = None
        self._stop = threading.Event()
        self._seen: dict[str, tuple[int, float]] = {}  # of others': their touch, and when we saw it

    def take(self) -> bool:
        if self._others():
            return False
        mine = self._laid()
        if mine is None:
            return False
        if others := self._others(mine.name):
            logger.debug("%s: withdrawn for %s", self.folder, others)
            self._withdraw(mine)
            return False
        for name in set(_names(self.folder)) - {mine.name}:
            logger.warning("%s: taken over from %s, which has died", self.folder, read_holder(name))
            (self.folder / name).unlink(missing_ok=True)
        self._mine, self._stop = mine, threading.Event()
        beat = (mine, self._stop)
        threading.Thread(target=_beat, args=beat, name=f"lock {mine.name}", daemon=True).start()
        return True

    def holder(self) -> Holder | None:
        return next(filter(None, map(read_holder, _names(self.folder))), None)

    def release(self) -> None:
        self._stop.set()
        if self._mine:
            self._withdraw(self._mine)
        self._mine = None

    def _others(self, mine: str = "") -> list[str]:
        """Claims of others that may be alive."""
        return [name for name in _names(self.folder) if name != mine and not self._dead(name)]

    def _dead(self, name: str) -> bool:
        """Whether its process is gone, or it was not touched while we watched it for `SILENCE`.

        Watched, not compared with a clock: those of two machines may differ.
        """
        holder = read_holder(name)
        if holder and holder.here:
            return holder.gone
        touched = _touched(self.folder / name)
        if touched is None:
            return True
        now = time.monotonic()
        if self._seen.get(name, (None, now))[0] != touched:
            self._seen[name] = touched, now
        return now - self._seen[name][1] > SILENCE

    def _laid(self) -> Path | None:
        """A new claim; None where another process has just removed the folder."""
        mine = self.folder / f"{myself().text()}~{secrets.token_hex(8)}"
        try:
            self.folder.mkdir(exist_ok=True)
            mine.touch(exist_ok=False)
        except FileNotFoundError:
            return None
        return mine

    def _withdraw(self, mine: Path) -> None:
        mine.unlink(missing_ok=True)
        with suppress(OSError):  # others have laid theirs
            self.folder.rmdir()


def _beat(mine: Path, stop: threading.Event) -> None:
    """Touch a claim until it is released; one that others removed stops this process.

    They held it for dead and do its work now: two must not write the same files.
    """
    while not stop.wait(HEARTBEAT):
        try:
            os.utime(mine)
        except FileNotFoundError:
            if not stop.is_set():
                logger.error(
                    "another process has taken over %s, as this one gave no sign of life for %.0f "
                    "s: stopping", mine.parent, SILENCE,
                )  # fmt: skip
                os.kill(os.getpid(), signal.SIGTERM)
            return
        except OSError as error:  # a file server that is away for a while
            logger.warning("%s could not be touched: %s", mine, error)


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []


def _touched(claim: Path) -> int | None:
    """When a claim was touched last; None where it is not there.

    Opened, because a client of a file server may remember the times of a file for a minute, but
    asks for them anew where it opens one.
    """
    try:
        with claim.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _claimed(folder: Path) -> bool:
    """Whether some claim is alive, judged at once: by the time of the file system's own clock."""
    return any(not _seems_dead(folder / name) for name in _names(folder))


def _seems_dead(claim: Path) -> bool:
    holder = read_holder(claim.name)
    if holder and holder.here:
        return holder.gone
    touched = _touched(claim)
    return touched is None or _now(claim.parent) - touched / 1e9 > SILENCE


def _now(folder: Path) -> float:
    """The time as the file system tells it; this machine's where it may not be written."""
    try:
        with tempfile.TemporaryFile(dir=folder.parent) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()
