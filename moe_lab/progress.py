"""Progress of long work: a bar with time left in a terminal, a line at each tenth elsewhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from tqdm import tqdm

logger = logging.getLogger(__name__)
Value = TypeVar("Value")


def progress(values: Iterable[Value], what: str, total: int | None = None) -> Iterator[Value]:
    """Pass `values` on while showing how far they are."""
    if total is None and isinstance(values, Sized):
        total = len(values)
    if sys.stderr.isatty():
        yield from tqdm(values, desc=what, total=total, dynamic_ncols=True, leave=False)
        return
    shown = 0
    for done, value in enumerate(values, start=1):
        yield value
        tenth = done * 10 // total if total else 0
        if tenth > shown and (tenth == 10 or total >= 5):
            shown = tenth
            logger.info("%s: %d of %d", what, done, total)
