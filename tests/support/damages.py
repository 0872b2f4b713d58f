"""Damage to files, by small numbers that say where and how: JSON, safetensors, and any bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

Path_ = tuple[Any, ...]
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 1000, 10**9, 10**30, 0.5, -0.5, 1e30, 1e-30,
    float("nan"), float("inf"), -float("inf"), "", "x", "0", "float99", "float64", "../x", "/x",
    "\x00", "\ud800", "x" * 5000, [], {}, [0], [-1], [1, 2, 3, 4], ["x"], [None], {"a": 1},
    {"x": []},
)  # fmt: skip


def places(node: Any, path: Path_ = ()) -> Iterator[Path_]:
    """Each place in a JSON value, outermost first."""
    yield path
    if isinstance(node, dict | list):
        for key in sorted(node) if isinstance(node, dict) else range(len(node)):
            yield from places(node[key], (*path, key))


def damaged_json(value: Any, where: int, how: int) -> Any:
    """A copy with one place changed: removed, renamed, or of another value of VALUES."""
    value = json.loads(json.dumps(value))
    every = list(places(value))
    path = every[where % len(every)]
    how %= len(VALUES) + 2
    if not path:
        return VALUES[how % len(VALUES)]
    node = value
    for key in path[:-1]:
        node = node[key]
    if how < len(VALUES):
        node[path[-1]] = VALUES[how]
    elif how == len(VALUES) or isinstance(node, list):
        del node[path[-1]]
    else:
        node[f"{path[-1]}_"] = node.pop(path[-1])
    return value


def truncated(content: bytes, where: int) -> bytes:
    """Its first bytes."""
    return content[: where % max(1, len(content))]


def flipped(content: bytes, where: int) -> bytes:
    """With one bit changed."""
    if not content:
        return content
    place = where % (8 * len(content))
    changed = bytearray(content)
    changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


def inserted(content: bytes, where: int) -> bytes:
    """With some bytes more."""
    place = where % (len(content) + 1)
    return content[:place] + (b'\xff\x00{["\n')[where % 5 :] + content[place:]


def emptied(content: bytes, where: int) -> bytes:
    return b""


def doubled(content: bytes, where: int) -> bytes:
    return content + content


BYTES: tuple[Callable[[bytes, int], bytes], ...] = (truncated, flipped, inserted, emptied, doubled)


def damaged_bytes(content: bytes, where: int, how: int) -> bytes:
    """A copy damaged in one of the ways of BYTES."""
    return BYTES[how % len(BYTES)](content, where)


def damaged_header(content: bytes, where: int, how: int) -> bytes:
    """A safetensors file whose header says something else of its tensors."""
    length = int.from_bytes(content[:8], "little")
    header = damaged_json(json.loads(content[8 : 8 + length]), where, how)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]
