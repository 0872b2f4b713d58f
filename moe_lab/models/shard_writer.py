"""Fills weight files that are planned (`shards.py`): pieces in any order, several at a time.

By hand: safetensors' own `save_file` wants all tensors of a file at once.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from functools import partial
from io import FileIO
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from moe_lab.integrity import Seals, damage, flush, seal_of
from moe_lab.models.shards import Entry, Shard, Span
from moe_lab.models.stored import INDEX

FICLONE = 0x40049409  # Linux: let a file share another one's blocks until one of them is written
STRETCH = 2**24  # bytes that are copied or read back at a time
THREADS = 4  # so many stretches at once: one is read while others are written and read back
Stretch = Callable[[], None]  # writes one
NOTHING_DONE: Seals = MappingProxyType({})


class NotWritten(RuntimeError):
    """A file that does not hold what was written into it: an error of the machine's, or ours."""


class _Buffers(threading.local):
    """Each thread's own memory for a stretch that is read, and for one that is read back."""

    def __init__(self) -> None:
        self.read, self.back = (torch.empty(STRETCH, dtype=torch.uint8) for _ in range(2))


class ShardWriter:
    """Fills the planned files of a folder; what was finished by an earlier attempt stays.

    To be used in a `with`, which closes its files. done: the seals of those that are finished, by
    their names; what an earlier attempt noted of them is taken where they are still the same.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], done: Seals = NOTHING_DONE):
        self.folder, self.shards = folder, list(shards)
        whole = (one.name for one in shards if one.name in done and self._is_whole(one, done))
        self.done: dict[str, Mapping[str, Any]] = {name: done[name] for name in whole}
        self._open: dict[str, FileIO] = {}
        self._flusher = ThreadPoolExecutor(1, "flush")  # the disk works while the next file fills
        self._flushing: dict[str, Future[dict[str, Any]]] = {}
        self._workers = ThreadPoolExecutor(THREADS, "write")
        self._buffers = _Buffers()
        self._missing = {one.name: {entry.name for entry in one.entries} for one in shards}
        self._place: dict[str, tuple[Shard, Entry, int]] = {}
        for shard in shards:
            offset = len(shard.header())
            for entry in shard.entries:
                self._place[entry.name] = shard, entry, offset
                offset += entry.num_bytes
        self._clean()

    def lacks(self, entries: Iterable[Entry]) -> bool:
        """Whether some of these tensors are still to be written."""
        shards = ((entry.name, self._place[entry.name][0]) for entry in entries)
        return any(self._is_open(one) and name in self._missing[one.name] for name, one in shards)

    def share_whole(self) -> tuple[int, str] | None:
        """Bring along the files of the source that come as they are: how many, and by which way."""
        ways = {""}
        shards = [one for one in self.shards if one.source is not None]
        for shard in shards:
            if shard.source is not None and shard.name not in self.done:
                ways.add(share_file(shard.source, self.folder / shard.name))
                flush(self.folder / shard.name)
                self.done[shard.name] = {"bytes": shard.source.stat().st_size}
        return (len(shards), ", ".join(filter(None, sorted(ways))) or "before") if shards else None

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors in their places, and read each back; those of finished files are left out.

        Files that have all of theirs are then finished. NotWritten where something else is there.
        """
        work: dict[str, list[Stretch]] = {}
        for name, tensor in tensors.items():
            shard, entry, offset = self._place[name]
            if Entry.of(name, tensor) != entry:
                raise NotWritten(f"{name} is {Entry.of(name, tensor)}, and was planned as {entry}")
            if self._is_open(shard):
                file, values = self._file(shard), tensor.contiguous().reshape(-1).view(torch.uint8)
                work[name] = [
                    partial(self._put, file, values[start : start + STRETCH], offset + start, name)
                    for start in range(0, len(values), STRETCH)
                ]
        self._do(work)

    def copy(self, spans: Mapping[str, Sequence[Span]]) -> None:
        """The same of tensors whose bytes lie in other files, one stretch behind the other."""
        work: dict[str, list[Stretch]] = {}
        for name, some in spans.items():
            shard, entry, offset = self._place[name]
            if sum(span.num_bytes for span in some) != entry.num_bytes:
                raise NotWritten(f"{name} has {entry.num_bytes} bytes, and was planned from {some}")
            if self._is_open(shard):
                file, work[name] = self._file(shard), []
                for one in (part for span in some for part in span.parts(STRETCH)):
                    work[name].append(partial(self._copy, file, one, offset, name))
                    offset += one.num_bytes
        self._do(work)

    def _do(self, work: Mapping[str, Sequence[Stretch]]) -> None:
        """Write stretches of tensors, several at a time; the tensors are then done with."""
        running = [self._workers.submit(one) for some in work.values() for one in some]
        for one in as_completed(running):  # what is left when one fails ends with the `with`
            one.result()
        for name in work:
            self._done_with(self._place[name][0], name)

    def _copy(self, file: FileIO, span: Span, offset: int, name: str) -> None:
        values = self._buffers.read[: span.num_bytes]
        with span.file.open("rb", buffering=0) as source:
            if hasattr(os, "posix_fadvise"):  # reading ahead costs time where stretches are long
                os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            _read_into(source, span.offset, values)
        self._put(file, values, offset, name)

    def _put(self, file: FileIO, values: Tensor, offset: int, name: str) -> None:
        """Write bytes at their place in a file, and read them back."""
        view = memoryview(values.numpy().data)
        while view:
            written = os.pwrite(file.fileno(), view, offset + len(values) - len(view))
            view = view[written:]
        back = self._buffers.back[: len(values)]
        _read_into(file, offset, back)
        if not _same(back, values):
            raise NotWritten(f"{file.name}: {name} was not written as it is")

    def _is_open(self, shard: Shard) -> bool:
        known = shard.name in self.done or shard.name in self._flushing
        return not known and shard.source is None

    def _file(self, shard: Shard) -> FileIO:
        if shard.name not in self._open:
            self._open[shard.name] = FileIO(self.folder / shard.name, "w+")
            self._open[shard.name].write(shard.header())
        return self._open[shard.name]

    def _done_with(self, shard: Shard, name: str) -> None:
        """One more tensor is there; the last one of a file finishes it."""
        self._missing[shard.name].discard(name)
        if not self._missing[shard.name]:
            self._open.pop(shard.name).close()
            place = self.folder / shard.name
            self._flushing[shard.name] = self._flusher.submit(seal_of, place)

    def __enter__(self) -> Self:
        return self

    def settle(self, all_of_them: bool = False) -> Seals:
        """Of the files that are finished and on disk; all: once the others are, too."""
        for name, flushing in list(self._flushing.items()):
            if all_of_them or flushing.done():
                self.done[name] = flushing.result()
                del self._flushing[name]
        return self.done

    def __exit__(self, *_: object) -> None:
        self._workers.shutdown(cancel_futures=True)
        self._flusher.shutdown()
        for file in self._open.values():
            file.close()

    def finish(self) -> None:
        """Write the index where there are several files; NotWritten where tensors are missing."""
        self.settle(all_of_them=True)
        if missing := [name for shard, left in self._missing.items() if shard not in self.done
                       for name in sorted(left)]:  # fmt: skip
            raise NotWritten(f"{self.folder} lacks {len(missing)} tensors, such as {missing[0]}")
        if len(self.shards) == 1:
            return
        places = {entry.name: shard.name for shard in self.shards for entry in shard.entries}
        size = sum(shard.num_bytes for shard in self.shards)
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _is_whole(self, shard: Shard, done: Seals) -> bool:
        file = self.folder / shard.name
        if shard.source is not None:  # as it is: the same file, where the disk can
            return file.is_file() and file.stat().st_size == shard.source.stat().st_size
        return damage(self.folder, {shard.name: done[shard.name]}, quick=False) is None

    def _clean(self) -> None:
        """Remove what an attempt that was broken off left behind, and others would read."""
        for file in [*self.folder.glob("*.safetensors"), self.folder / INDEX]:
            if file.name not in self.done:
                file.unlink(missing_ok=True)


def _read_into(file: FileIO, offset: int, target: Tensor) -> None:
    """Fill a tensor of bytes with those of a file; NotWritten where the file ends before."""
    view = memoryview(target.numpy().data)
    while view:
        number = os.preadv(file.fileno(), [view], offset + len(target) - len(view))
        if not number:
            raise NotWritten(f"{file.name} ends before byte {offset + len(target)}")
        view = view[number:]


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same bytes, which is seen fastest eight at a time."""
    first, second = one.numpy(), other.numpy()
    if len(first) % 8 == 0:
        first, second = first.view(np.int64), second.view(np.int64)
    return np.array_equal(first, second)


def share_file(source: Path, target: Path) -> str:
    """Have the bytes of a file under another name, too, by the cheapest way; which one it was.

    clone: the two share blocks until one of them is written; link: they are one file; copy.
    """
    real = source.resolve()
    target.unlink(missing_ok=True)
    if _clone(real, target):
        return "clone"
    try:
        os.link(real, target)
        return "link"
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
    shutil.copyfile(real, target)
    return "copy"


def _clone(source: Path, target: Path) -> bool:
    try:
        import fcntl
    except ImportError:  # not on Windows
        return False
    try:
        with source.open("rb") as one, target.open("wb") as other:
            fcntl.ioctl(other.fileno(), FICLONE, one.fileno())
            return True
    except OSError:
        target.unlink(missing_ok=True)
        return False
