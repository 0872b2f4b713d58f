"""How often the processor would wait for a GPU: counted on any machine, from the operators called.

What reads numbers out of a tensor, or makes a tensor whose size depends on numbers, waits for all
work that the device was given before.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITING = ("_local_scalar_dense", "nonzero", "_unique2", "unique_consecutive", "masked_select",
           "bincount", "unique_dim", "equal", "is_nonzero")  # fmt: skip


class HostReads(TorchDispatchMode):
    """Counts them by operator; of `index` those with a mask, of copies those off the device."""

    def __init__(self) -> None:
        super().__init__()
        self.by_operator: Counter[str] = Counter()

    @property
    def number(self) -> int:
        """All of them."""
        return self.by_operator.total()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__  # type: ignore[attr-defined]
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        masked = any(one.dtype == torch.bool for one in tensors[1:])
        target = (kwargs or {}).get("device")
        leaves = name == "_to_copy" and target is not None and tensors[0].device != target
        if name in WAITING or (name in ("index", "index_put", "index_put_") and masked) or leaves:
            self.by_operator[name] += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def host_reads() -> Iterator[HostReads]:
    """Count what is read while it is open. `Tensor.tolist` reads a CPU's numbers unseen: it counts
    as one, too."""
    reads = HostReads()
    plain = Tensor.tolist

    def tolist(self: Tensor) -> Any:
        reads.by_operator["tolist"] += 1
        return plain(self)

    Tensor.tolist = tolist  # type: ignore[method-assign]
    try:
        with reads:
            yield reads
    finally:
        Tensor.tolist = plain  # type: ignore[method-assign]
