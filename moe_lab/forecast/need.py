"""What one stage of a run will need."""

from __future__ import annotations

from dataclasses import dataclass

GIBIBYTE = 2**30


@dataclass(frozen=True)
class Need:
    """memory: bytes beyond the process with its libraries; mapped: those of weights among them that
    are used where they lie in files; read: bytes of weights that are read.

    kept: bytes that stay on disk; scratch: further ones while it works; flops: operations; seconds:
    of this processor with one thread; itemsize: bytes of a number that it computes with. cached:
    whether the store has the result, None where that is not known. on_device: whether it works
    where the model computes. note: what is assumed.
    """

    stage: str
    memory: float
    mapped: float = 0.0
    read: float = 0.0
    kept: float = 0.0
    scratch: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0
    itemsize: int = 4
    cached: bool | None = None
    on_device: bool = True
    note: str = ""
