"""The weight files of a checkpoint that is written piece by piece, planned before they are filled.

What lies where is known before any weight is: names, dtypes and shapes. So each file has its whole
header from the start, and `shard_writer.py` puts tensors in their places as they come. A file is
what safetensors' own `save_file` would have written of its tensors, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe_lab.models.stored import STORED_DTYPES
from moe_lab.models.weight_files import SINGLE

FILE_BYTES = 2 * 2**30
DTYPE_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}  # in the order of a file
FORMAT = {"format": "pt"}  # without it transformers does not read a file


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, which need not be there yet."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Entry:
        """What is known of a tensor, which may be without values."""
        return cls(name, tensor.dtype, tuple(tensor.shape))

    @property
    def num_bytes(self) -> int:
        """Bytes of its values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Span:
    """A stretch of a file."""

    file: Path
    offset: int
    num_bytes: int

    def parts(self, most: int) -> Iterator[Span]:
        """The same bytes in stretches of so many at most."""
        for start in range(0, self.num_bytes, most):
            size = min(most, self.num_bytes - start)
            yield Span(self.file, self.offset + start, size)


@dataclass(frozen=True)
class Shard:
    """One file: its name, and its tensors in their order.

    source: the file of the source that it is, byte for byte, where it is one.
    """

    name: str
    entries: tuple[Entry, ...]
    source: Path | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(entry.num_bytes for entry in self.entries)

    def header(self, metadata: Mapping[str, str] = FORMAT) -> bytes:
        """What stands before the values."""
        values: dict[str, object] = {"__metadata__": dict(metadata)}
        offset = 0
        for one in self.entries:
            end = offset + one.num_bytes
            values[one.name] = {
                "dtype": DTYPE_NAMES[one.dtype],
                "shape": list(one.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(values, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def plan_shards(
    pieces: Iterable[Sequence[Entry]],
    whole: Sequence[Path] = (),
    held: Mapping[str, Path] | None = None,
    limit: int = FILE_BYTES,
) -> list[Shard]:
    """The files of a checkpoint: pieces in their order, as many in a file as `limit` bytes take.

    A piece that is larger has several files of its own. whole: files of the source that come along
    as they are; held: which file of the source a tensor lies in.
    """
    held, pieces = held or {}, [list(piece) for piece in pieces]
    every = [entry for piece in pieces for entry in piece]
    found: list[tuple[list[Entry], Path | None]] = [
        ([entry for entry in every if held.get(entry.name) == file], file) for file in whole
    ]
    size = limit + 1
    for piece in pieces:
        for some in _split([one for one in piece if held.get(one.name) not in whole], limit):
            more = sum(entry.num_bytes for entry in some)
            if size + more > limit:
                found.append(([], None))
                size = 0
            found[-1][0].extend(some)
            size += more
    count = len(found)
    names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    return [
        Shard(SINGLE if count == 1 else name, tuple(_ordered(entries)), source)
        for name, (entries, source) in zip(names, found, strict=True)
    ]


def _split(entries: Sequence[Entry], limit: int) -> Iterable[list[Entry]]:
    """The tensors of one piece in parts of at most `limit` bytes, or of one tensor."""
    part: list[Entry] = []
    size = 0
    for entry in entries:
        if part and size + entry.num_bytes > limit:
            yield part
            part, size = [], 0
        part.append(entry)
        size += entry.num_bytes
    if part:
        yield part


def _ordered(entries: Iterable[Entry]) -> list[Entry]:
    """As safetensors orders them: so that each begins at a multiple of its items' size."""
    order = list(DTYPE_NAMES)
    return sorted(entries, key=lambda one: (order.index(one.dtype), one.name))


def layout_digest(shards: Sequence[Shard], made_of: str) -> str:
    """12 hex of what the files will be: names, order, dtypes, shapes, and what they are made of."""
    plain = [made_of, *((one.name, one.header().hex(), str(one.source or "")) for one in shards)]
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:12]
