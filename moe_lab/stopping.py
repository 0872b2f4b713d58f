"""Signals that stop a run: what they raise, what holds them back for a moment, how it ends.

Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 (one of which Slurm sends before a job's time is up:
`#SBATCH --signal=B:USR1@120`, submitit USR2) raise `Stopped`, and a second one ends the process at
once, unless it is a mere warning (USR1 or USR2), or a launcher of several processes may have passed
on what they had heard themselves. Where Python swallows what a signal raises, the next `check`
raises it again.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType

# An exit code is 128 + its number.
SIGNAL_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
SIGNALS = tuple(signal.Signals[name] for name in SIGNAL_NAMES if hasattr(signal, name))
WARNINGS = tuple(one for one in SIGNALS if one.name.startswith("SIGUSR"))
PASSED_ON = 10.0  # seconds in which a launcher hands on what its processes have heard themselves
TOLD = "{}: stopping, what is finished is kept; a second signal stops at once\n"


class Stopped(KeyboardInterrupt):
    """A signal asks the run to stop; to libraries it is Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    def __reduce__(self) -> tuple[type[Stopped], tuple[int]]:
        return Stopped, (self.number,)


@dataclass
class _State:
    asked: int | None = None
    since: float = 0.0
    came: set[int] = field(default_factory=set)
    held: int = 0
    installed: int | None = None  # in which process: one forked off takes none by itself
    instead: Callable[[int], object] | None = None


_state = _State()


def install() -> None:
    """Take the signals from now on; those that are ignored (nohup) stay so.

    Whatever a stopped process has started ends with it, behind what libraries do at the end, such
    as W&B, which speaks to its service: what is registered first is called last.
    """
    _state.installed = os.getpid()
    atexit.register(lambda: end_children() if asked() else None)
    for one in SIGNALS:
        if signal.getsignal(one) is not signal.SIG_IGN:
            signal.signal(one, _arrived)
    tell = sys.unraisablehook
    sys.unraisablehook = lambda odd: None if isinstance(odd.exc_value, Stopped) else tell(odd)


def installed() -> bool:
    """Whether this process takes the signals."""
    return _state.installed == os.getpid()


def _arrived(number: int, frame: FrameType | None) -> None:
    _state.came.add(number)
    if _state.asked is not None:
        again = time.monotonic() < _state.since + PASSED_ON and "RANK" in os.environ
        if number in WARNINGS or again:
            return
        end_children()
        os._exit(128 + number)
    ask(number)
    if os.environ.get("RANK", "0") == "0":
        os.write(2, TOLD.format(signal.Signals(number).name).encode())
    if _state.instead:
        _state.instead(number)
    else:
        check()


def ask(number: int) -> None:
    """Have this process stop as by the signal of this number, at the next `check`."""
    _state.asked, _state.since = number, time.monotonic()


def number() -> int | None:
    """The number of the signal that has come, also where it is held back; None: none has."""
    return _state.asked


def ignore() -> None:
    """Take no further signal: the process is at its end."""
    for one in SIGNALS:
        signal.signal(one, signal.SIG_IGN)


def asked() -> bool:
    """Whether a signal has come, also where it is held back."""
    return _state.asked is not None


def came(number: int) -> bool:
    """Whether this signal has come, be it the first or behind another."""
    return number in _state.came


def do_instead(call: Callable[[int], object]) -> None:
    """From now on the first signal calls this with its number; only `check` raises `Stopped`."""
    _state.instead = call


def check() -> None:
    """Raise `Stopped` where a signal has come and nothing holds it back."""
    if _state.asked is not None and not _state.held:
        raise Stopped(_state.asked)


@contextmanager
def hold() -> Iterator[None]:
    """Hold signals back while something is done that must not be left by halves."""
    _state.held += 1
    try:
        yield
    finally:
        _state.held -= 1


def name_of(stop: KeyboardInterrupt) -> str:
    """What stopped the run: Ctrl-C, or the signal's name."""
    number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def exit_code(stop: KeyboardInterrupt) -> int:
    """As shells say it: 130 after Ctrl-C, 143 after SIGTERM."""
    return 128 + (stop.number if isinstance(stop, Stopped) else signal.SIGINT)


def end_children() -> None:
    """End what this process has started and what that has, such as W&B's service or vLLM's."""
    import psutil

    children = psutil.Process().children(recursive=True)
    for one in children:
        with suppress(psutil.NoSuchProcess):
            one.terminate()
    for one in psutil.wait_procs(children, timeout=1.0)[1]:
        with suppress(psutil.NoSuchProcess):
            one.kill()


@contextmanager
def passed_on(send: Callable[[int], object]) -> Iterator[None]:
    """While a child runs: give it the signals that a terminal does not, and wait for its end."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        _state.asked = number
        send(number)

    before = {one: signal.signal(one, pass_on) for one in SIGNALS if one != signal.SIGINT}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
