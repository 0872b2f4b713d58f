"""moe_lab.locks: one holder at a time, by the kernel or by claims; the dead are told apart."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from running import ROOT

from moe_lab import locks
from moe_lab.locks import Holder, Lock, held, locked, myself, read_holder, taken
from moe_lab.types import UserError

EACH_WAY = pytest.mark.parametrize("way", locks.WAYS)
HOLD = """
import sys, time, pathlib
from moe_lab import locks
with locks.locked(pathlib.Path(sys.argv[1]), "it"):
    print("held", flush=True)
    time.sleep(60)
"""
# Each takes the lock, and writes when it came in and when it went out.
RACE = """
import random, sys, time, pathlib
from moe_lab import locks
path, own = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
locks.POLL = 0.001, 0.01
print("ready", flush=True)
sys.stdin.readline()
for _ in range(5):
    with locks.locked(path, "it"):
        came = time.monotonic_ns()
        time.sleep(random.uniform(0, 0.004))
        with own.open("a") as file:
            file.write(f"{came} {time.monotonic_ns()}\\n")
"""


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test asks its folder anew."""
    monkeypatch.setattr(locks, "_answers", {})
    monkeypatch.delenv(locks.WAY, raising=False)


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without the kernel's locks, as NFS without its lock manager answers."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "HEARTBEAT", 0.05)
    monkeypatch.setattr(locks, "SILENCE", 0.4)
    monkeypatch.setattr(locks, "POLL", (0.01, 0.03))


def started(program: str, *words: object, way: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, words)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {locks.WAY: way, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def claim_of(holder: Holder, path: Path, age: float = 0.0) -> Path:
    """A claim as another process leaves it, last touched `age` seconds ago."""
    folder = path.with_suffix(locks.LEASE)
    folder.mkdir(exist_ok=True)
    claim = folder / f"{holder.text()}~0123456789abcdef"
    claim.touch()
    os.utime(claim, (time.time() - age,) * 2)
    return claim


ELSEWHERE = Holder("node7+deadbeef+4026531836", 4242, "99")


@EACH_WAY
def test_one_at_a_time(tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(locks.WAY, way)
    path = tmp_path / "a.lock"
    assert not held(path)
    with locked(path, "it"):
        assert held(path)
        assert locks.holder_of(path) == myself()
        assert not Lock(path).take()
        with taken(path) as second:
            assert second is None
    assert not held(path)
    with taken(path) as lock:
        assert lock
        lock.remove()
    assert os.listdir(tmp_path) == []


def test_the_kernels_locks_are_used_where_there_are_some(tmp_path: Path) -> None:
    with locked(tmp_path / "a.lock", "it"):
        assert os.listdir(tmp_path) == ["a.lock"]


def test_claims_are_used_where_there_are_none(
    tmp_path: Path, no_flock: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), locked(tmp_path / "a.lock", "it"):
        assert os.listdir(tmp_path) == ["a.lease"]
        assert not Lock(tmp_path / "a.lock").take()
    assert os.listdir(tmp_path) == []
    assert caplog.text.count("No locks available") == 1


def test_a_probe_that_tells_nothing_leaves_the_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(locks.tempfile, "TemporaryFile", full)
        assert locks.kernel_locks(tmp_path)
    monkeypatch.setattr(locks, "ONE_MACHINE", locks.re.compile(""))
    assert not locks.kernel_locks(tmp_path)  # it was not remembered


@pytest.mark.parametrize(
    ("options", "one_machine"),
    [
        ("rw,relatime rw,vers=3,nolock,addr=10.0.0.1", True),
        ("rw rw,vers=4.2,local_lock=none", False),
        ("rw rw,vers=3,local_lock=flock", True),
        ("rw rw,vers=3,local_lock=posix", False),
        ("rw rw,localflock", True),
        ("rw rw,flock,lazystatfs", False),
    ],
)
def test_mounts_that_lock_on_one_machine_alone(
    tmp_path: Path, options: str, one_machine: bool
) -> None:
    device = os.makedev(0, 45)
    own, of_system = options.split()
    (tmp_path / "mountinfo").write_text(
        "23 1 8:1 / / rw,nolock - ext4 /dev/sda rw\n"
        f"36 23 0:45 / /scratch {own} shared:1 - nfs server:/scratch {of_system}\n"
    )
    told = locks._mount_options(device, tmp_path / "mountinfo")
    assert bool(locks.ONE_MACHINE.search(told)) == one_machine
    assert locks._mount_options(device, tmp_path / "none") == ""


def test_another_word_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(locks.WAY, "soft")
    with pytest.raises(UserError, match=r"MOE_LAB_LOCKS=soft.*kernel, files"):
        Lock(tmp_path / "a.lock")


@EACH_WAY
def test_a_killed_holder_is_followed_at_once(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(locks.WAY, way)
    path = tmp_path / "a.lock"
    with started(HOLD, path, way=way) as process:
        assert process.stdout and process.stdout.readline() == "held\n"
        assert held(path)
        holder = locks.holder_of(path)
        assert holder and (holder.pid, holder.here, holder.gone) == (process.pid, True, False)
        with taken(path) as lock:
            assert lock is None
        process.kill()
    assert not held(path)
    with taken(path) as lock:
        assert lock
    if way == "files":
        assert f"taken over from process {process.pid} on" in caplog.text


def test_a_process_with_the_number_of_a_dead_one_is_another(tmp_path: Path, no_flock: None) -> None:
    path, mine = tmp_path / "a.lock", myself()
    claim_of(Holder(mine.host, mine.pid, str(int(mine.started) - 1)), path)
    assert not held(path)
    with taken(path) as lock:
        assert lock


def test_a_dead_machine_is_followed_when_its_time_is_up(
    tmp_path: Path, no_flock: None, fast: None, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.lock"
    claim_of(ELSEWHERE, path)
    assert held(path)
    with taken(path) as lock:
        assert lock is None  # it may be alive
    began = time.monotonic()
    with caplog.at_level(logging.INFO), locked(path, "a result"):
        assert time.monotonic() - began > locks.SILENCE
    assert "waiting for another job (process 4242 on node7) that is making a result" in caplog.text
    assert "taken over from process 4242 on node7, which has died" in caplog.text
    claim_of(ELSEWHERE, path, age=3600.0)
    assert not held(path)  # at once, by the clock


def test_a_clock_that_is_ahead_does_not_rob_the_living(
    tmp_path: Path, no_flock: None, fast: None
) -> None:
    """Another machine's claim, touched all the time, whose times are an hour old."""
    path = tmp_path / "a.lock"
    claim = claim_of(ELSEWHERE, path, age=3600.0)
    lock, end = Lock(path), time.monotonic() + 3 * locks.SILENCE
    for number in range(1000):
        os.utime(claim, (time.time() - 3600 + number,) * 2)
        assert not lock.take()
        if time.monotonic() > end:
            break
        time.sleep(0.02)


def test_the_patient_wait_for_another_machine_alone(
    tmp_path: Path, no_flock: None, fast: None
) -> None:
    path = tmp_path / "a.lock"
    with locked(path, "it"), taken(path, patient=True) as lock:
        assert lock is None  # at once: it is this machine's, and lives
    claim_of(ELSEWHERE, path)
    with taken(path, patient=True) as lock:
        assert lock


def test_a_living_holder_touches_its_claim(tmp_path: Path, no_flock: None, fast: None) -> None:
    path = tmp_path / "a.lock"
    with locked(path, "it"):
        (claim,) = path.with_suffix(locks.LEASE).iterdir()
        os.utime(claim, (0, 0))
        time.sleep(4 * locks.HEARTBEAT)
        assert claim.stat().st_mtime > 0


@pytest.fixture
def told_to_stop(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    told: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    yield told
    signal.signal(signal.SIGTERM, before)


def test_who_was_held_for_dead_stops(
    tmp_path: Path, no_flock: None, fast: None, told_to_stop: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    path = tmp_path / "a.lock"
    with locked(path, "it"):
        (claim,) = path.with_suffix(locks.LEASE).iterdir()
        claim.unlink()
        end = time.monotonic() + 5
        while not told_to_stop and time.monotonic() < end:
            time.sleep(0.01)
    assert told_to_stop == [signal.SIGTERM]
    assert "another process has taken over" in caplog.text


def test_a_machine_with_the_kernels_locks_minds_the_claims_of_one_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.lock"
    claim = claim_of(ELSEWHERE, path)
    assert not Lock(path).take()
    claim.unlink()
    assert Lock(path).take()


@EACH_WAY
def test_of_many_takers_never_two_hold_it(tmp_path: Path, way: str) -> None:
    """Six processes, five times each, the lock of a dead one lying there at first."""
    path = tmp_path / "a.lock"
    mine = myself()
    claim_of(Holder(mine.host, 2**22 + 1, "1"), path)
    takers = [started(RACE, path, tmp_path / f"{n}.txt", way=way) for n in range(6)]
    for taker in takers:
        assert taker.stdout and taker.stdout.readline() == "ready\n"
    for taker in takers:
        assert taker.stdin
        taker.stdin.write("\n")
        taker.stdin.close()
    assert [taker.wait(60) for taker in takers] == [0] * 6
    for taker in takers:
        assert taker.stdout
        taker.stdout.close()
    lines = [line for file in tmp_path.glob("*.txt") for line in file.read_text().splitlines()]
    times = sorted(tuple(map(int, line.split())) for line in lines)
    assert len(times) == 30
    assert all(out < came for (_, out), (came, _) in pairwise(times))


@pytest.mark.parametrize("text", ["", "host", "host~x~1", "a/b~1~2", "~1~2", "host~1"])
def test_what_names_no_holder(text: str) -> None:
    assert read_holder(text) is None


def test_holders_are_read_as_written() -> None:
    for holder in (myself(), ELSEWHERE, Holder("a", 1, "")):
        assert read_holder(holder.text()) == holder
