"""Signals: the first stops with what is finished, a second at once; nothing is left by halves."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from moe_lab import stopping
from moe_lab.progress import progress

PREPARED = """
import os, signal, subprocess, sys, time
from moe_lab import stopping
stopping.install()
def stop(name): os.kill(os.getpid(), getattr(signal, name))
"""
ENDED = """
except KeyboardInterrupt as stop:
    print("ended by", stopping.name_of(stop), flush=True)
    sys.exit(stopping.exit_code(stop))
"""


@pytest.fixture(autouse=True)
def none_ignored() -> Iterator[None]:
    """Children take the signals, also where whoever started the tests has them ignored."""
    before = {one: signal.signal(one, signal.default_int_handler) for one in stopping.SIGNALS}
    yield
    for one, handler in before.items():
        signal.signal(one, handler)


def script(body: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"{PREPARED}\ntry:\n{body}\n{ENDED}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


@pytest.mark.parametrize("name", stopping.SIGNAL_NAMES)
def test_a_signal_ends_with_its_code_and_says_so(name: str) -> None:
    done = script(f"    stop({name!r}); print('not reached')")
    number = getattr(signal, name)
    assert done.returncode == 128 + number
    assert done.stdout == f"ended by {'Ctrl-C' if name == 'SIGINT' else name}\n"
    assert done.stderr.startswith(f"{name}: stopping") and "Traceback" not in done.stderr


def test_a_second_signal_stops_at_once_and_children_end_too() -> None:
    body = """
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    print(child.pid, flush=True)
    with stopping.hold():
        stop("SIGHUP"); print("held", flush=True); stop("SIGTERM"); print("not reached")
"""
    started = time.monotonic()
    done = script(body)
    assert done.returncode == 128 + signal.SIGTERM
    pid, held = done.stdout.split()
    assert held == "held" and time.monotonic() - started < 30
    assert not psutil.pid_exists(int(pid)) or psutil.Process(int(pid)).status() == "zombie"


def test_a_warning_behind_another_signal_is_kept_in_mind() -> None:
    """As submitit's behind the SIGTERM of a preemption: what is being saved is saved."""
    body = """
    try:
        stop("SIGTERM")
    finally:
        stop("SIGUSR2"); stop("SIGUSR1")
        print(stopping.came(signal.SIGUSR2), stopping.came(signal.SIGHUP), flush=True)
"""
    done = script(body)
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stdout == "True False\nended by SIGTERM\n"


@pytest.mark.usefixtures("installed")
def test_what_is_called_instead_and_the_end_behind_it() -> None:
    called = []
    stopping.do_instead(called.append)
    os.kill(os.getpid(), signal.SIGHUP)
    assert called == [signal.SIGHUP]
    with pytest.raises(stopping.Stopped, match="SIGHUP"):
        stopping.check()


def test_another_process_can_be_told_of_a_stop() -> None:
    stop = pickle.loads(pickle.dumps(stopping.Stopped(signal.SIGTERM)))
    assert isinstance(stop, stopping.Stopped) and stopping.exit_code(stop) == 143


def test_children_end_behind_what_libraries_do_at_the_end() -> None:
    """As W&B speaks to its service once more."""
    body = """
    import atexit
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    atexit.register(lambda: print("there" if child.poll() is None else "gone", child.pid))
    stop("SIGTERM")
"""
    done = script(body)
    assert done.returncode == 128 + signal.SIGTERM
    word, pid = done.stdout.split()[-2:]
    assert word == "there"
    assert not psutil.pid_exists(int(pid)) or psutil.Process(int(pid)).status() == "zombie"


def test_an_ignored_signal_stays_ignored() -> None:
    """As nohup leaves SIGHUP, and a shell SIGINT of what runs in the background."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        done = script("    stop('SIGHUP'); print('goes on')")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (done.returncode, done.stdout) == (0, "goes on\n")


@pytest.mark.usefixtures("installed")
def test_what_is_held_is_done_to_its_end() -> None:
    reached = []
    with pytest.raises(stopping.Stopped) as stop:
        with stopping.hold(), stopping.hold():
            os.kill(os.getpid(), signal.SIGTERM)
            stopping.check()
            assert stopping.asked()
            reached.append("end")
        reached.append("behind, where nothing looks yet")
        stopping.check()
    assert len(reached) == 2 and stopping.exit_code(stop.value) == 143


@pytest.mark.usefixtures("installed")
def test_what_was_swallowed_is_raised_again() -> None:
    """Python drops what comes up in a finalizer, and libraries may drop a Ctrl-C."""
    done = []
    with pytest.raises(KeyboardInterrupt, match="SIGUSR1"):
        for number in progress(range(5), "work"):
            done.append(number)
            if number == 1:
                try:
                    os.kill(os.getpid(), signal.SIGUSR1)
                    time.sleep(1)
                except BaseException:  # noqa: BLE001 - this is what must not matter
                    pass
    assert done == [0, 1]


@pytest.mark.usefixtures("installed")
def test_a_child_is_given_what_came() -> None:
    got: list[int] = []
    with stopping.passed_on(got.append):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
    assert got == [signal.SIGTERM, signal.SIGUSR1] and stopping.asked()
    assert signal.getsignal(signal.SIGUSR1) == stopping._arrived, "as it was before"


def test_plain_ctrl_c_has_a_name_and_a_code() -> None:
    stop = KeyboardInterrupt()
    assert (stopping.name_of(stop), stopping.exit_code(stop)) == ("Ctrl-C", 130)
