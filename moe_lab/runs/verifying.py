"""Looking at every byte of a store: `python -m moe_lab.runs FOLDER --verify`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from moe_lab.locks import taken
from moe_lab.progress import progress
from moe_lab.runs.cleaning import Contents, Result
from moe_lab.runs.listing import many, size
from moe_lab.store import DONE, FILES, damage_of, read_record, set_aside


def damaged(store: Contents) -> dict[Result, str]:
    """The finished results that are not what was written, and why: all sizes, all sums."""
    found = {}
    for one in progress(_finished(store), "verify"):
        if wrong := damage_of(one.folder, quick=False):
            found[one] = wrong
    return found


def lines_of(store: Contents, found: dict[Result, str]) -> Iterator[str]:
    """What was looked at, and each damaged result, a line each."""
    finished = _finished(store)
    without = sum(FILES not in read_record(one.folder) for one in finished if one not in found)
    looked = size(sum(one.bytes for one in finished))
    yield f"{store.root}: {many(len(finished), 'result')} ({looked}), {len(found)} damaged"
    if without:
        yield f"{many(without, 'result')} of these from before sums were kept: only their records"
    for one, wrong in found.items():
        yield f"  {one.kind}/{one.key}: {wrong}"


def set_all_aside(found: Iterable[Result]) -> Iterator[Path]:
    """Move damaged results out of the way, so that they are made again; where each lies now.

    One that a job holds now is left: it sets aside by itself what it finds damaged.
    """
    for one in found:
        with taken(one.lock) as lock:
            if lock and damage_of(one.folder, quick=False):  # not made again meanwhile
                yield set_aside(one.folder)


def _finished(store: Contents) -> list[Result]:
    """The results that say that they are done, also those whose record cannot be read."""
    return [one for one in store.results if (one.folder / DONE).exists()]
