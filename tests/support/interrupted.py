"""Work in forks of this process that are killed in the midst of it, until one comes to its end."""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

import torch


def num_lines(work: Callable[[], object], inside: str) -> int:
    """How many lines of moe_lab Python executes from the first call of a function on."""
    lines = Lines(inside, sys.maxsize)
    sys.settrace(lines.trace)
    try:
        work()
    finally:
        sys.settrace(None)
    return lines.passed


def ends(work: Callable[[], object], inside: str, most: int) -> bool:
    """Whether a fork that does the work ends it; it is killed (SIGKILL) at so many lines.

    Those are lines that Python executes, so that every state between two of them can be had again.
    """
    status = _status(_forked(work, Lines(inside, most)))
    assert status in (0, -signal.SIGKILL), f"the fork ended with {status}"
    return status == 0


def end_together(work: Callable[[], object], inside: str, most: Sequence[int]) -> list[int]:
    """Exit codes of forks that do the work as torchrun starts processes; most: lines of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    forks = []
    for rank, lines in enumerate(most):
        environment = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(most)),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
        }  # fmt: skip
        forks.append(_forked(work, Lines(inside, lines), environment))
    return [_status(fork) for fork in forks]


def _forked(
    work: Callable[[], object], lines: Lines, environment: Mapping[str, str] | None = None
) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        child = os.fork()
    if not child:
        os.environ.update(environment or {})
        _work(work, lines)
    return child


def _status(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kills_before_the_end(work: Callable[[], object], inside: str, seed: int, most: int) -> int:
    """Start the work again and again, each time killed at a line that is drawn; how many kills."""
    draw = random.Random(seed)
    for number in range(200):
        if ends(work, inside, draw.randrange(most)):
            return number
    raise AssertionError("it never ends")


class Lines:
    """Counts the lines of moe_lab from the first call of a function on; kills at the last."""

    def __init__(self, inside: str, most: int) -> None:
        self.inside, self.most, self.passed, self.begun = inside, most, 0, False

    def trace(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        if "moe_lab" not in frame.f_code.co_filename:
            return None
        self.begun = self.begun or frame.f_code.co_qualname == self.inside
        self.passed += self.begun and event == "line"
        if self.passed > self.most:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.trace


def _work(work: Callable[[], object], lines: Lines) -> None:
    torch.set_num_threads(1)
    try:
        sys.settrace(lines.trace)
        work()
    except BaseException:  # noqa: BLE001 - a fork never goes on in the caller's place
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
