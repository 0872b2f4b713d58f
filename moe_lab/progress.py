"""Progress of long work: a bar with time left in a terminal, a line at each tenth elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from tqdm import tqdm

from moe_lab import processes, stopping

logger = logging.getLogger(__name__)
Value = TypeVar("Value")


def progress(values: Iterable[Value], what: str, total: int | None = None) -> Iterator[Value]:
    """Pass `values` on while showing how far they are."""
    if total is None and isinstance(values, Sized):
        total = len(values)
    if sys.stderr.isatty() and processes.speaks():
        for value in tqdm(values, desc=what, total=total, dynamic_ncols=True, leave=False):
            stopping.check()
            yield value
        return
    shown, started = 0, time.monotonic()
    for done, value in enumerate(values, start=1):
        stopping.check()
        yield value
        tenth = done * 10 // total if total else 0
        if total and tenth > shown and (tenth == 10 or total >= 5):
            shown = tenth
            left = (time.monotonic() - started) * (total - done) / done
            told = f", {duration(left)} left" if tenth < 10 and left >= 1 else ""
            logger.info("%s: %d of %d%s", what, done, total, told)


def duration(seconds: float) -> str:
    """A time for people: 12.3 s, 4 min 5 s, 2 h 30 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
