"""What of a compressed checkpoint's files is in its source's files byte for byte: found by headers.

All of layers that nothing happens to, and what is around an edited block; of a block of which
experts are removed, the experts that stay: each its own tensors, or its rows of those of all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moe_lab.models.edits.chain import Chain
from moe_lab.models.layers import MoELayer
from moe_lab.models.shards import DTYPE_NAMES, Entry, Span
from moe_lab.models.stored import Held, Stored

Spans = Mapping[str, Sequence[Span]]  # by a tensor's name in the result's files


@dataclass(frozen=True)
class Moved:
    """A decoder layer on its way from the source to the result.

    old, new: its numbers; chain: its edits, None where nothing happens to it; layer: the MoE layer
    that they are of.
    """

    old: int
    new: int
    chain: Chain | None = None
    layer: MoELayer | None = None

    def kept(self, name: str) -> tuple[int, ...] | None:
        """Of which experts a tensor is in the result, in their order; None: of the layer.

        name: the tensor's, in the source's model. LookupError for one that edits may change.
        """
        if self.chain is None or self.layer is None:
            return None
        if not name.startswith(f"{self.layer.info.name}."):
            return None
        if not self.chain.keeps_experts_as_they_are or name not in self._of_experts():
            raise LookupError(name)
        every = tuple(range(self.layer.info.num_experts))
        return every if self.chain.experts_kept is None else self.chain.experts_kept

    def _of_experts(self) -> set[str]:
        assert self.layer is not None
        block, experts = self.layer.block, self.layer.experts
        path = next((path for path, module in block.named_modules() if module is experts), None)
        if not path:  # the experts are in no block of their own
            return set()
        names = (name for name, _ in experts.named_parameters())
        return {f"{self.layer.info.name}.{path}.{name}" for name in names}


def spans_of(moved: Moved, name: str, entries: Sequence[Entry], files: Held) -> Spans | None:
    """Where the files of the source hold what stands of a tensor in the result's; None: nowhere.

    name: the tensor's in the source's model; entries: what stands of it in the result's files.
    """
    try:
        kept = moved.kept(name)
    except LookupError:
        return None
    stored = {one.key: one for one in files.by_name.get(name, ())}
    found = {entry.name: _spans(moved, entry, kept, stored) for entry in entries}
    return None if None in found.values() else {k: v for k, v in found.items() if v is not None}


def _spans(
    moved: Moved, entry: Entry, kept: Sequence[int] | None, stored: Mapping[str, Stored]
) -> Sequence[Span] | None:
    """The bytes of one tensor of the result's files, piece after piece."""
    parts = entry.name.split(".")
    if str(moved.new) not in parts:
        return None
    at = parts.index(str(moved.new))
    parts[at] = str(moved.old)
    place = next((n for n in range(at + 1, len(parts)) if parts[n].isdigit()), None)
    if kept is not None and place is not None:
        number = int(parts[place])
        if number >= len(kept):  # what stands behind the experts
            return None
        parts[place] = str(kept[number])
    one = stored.get(".".join(parts))
    if one is None or one.parts or one.kind != DTYPE_NAMES[entry.dtype]:
        return None
    if one.shape == entry.shape and (kept is None or place is not None):
        return [Span(one.file, one.offset, one.num_bytes)]
    return None if kept is None or place is not None else _rows(entry, kept, one)


def _rows(entry: Entry, kept: Sequence[int], one: Stored) -> Sequence[Span] | None:
    """The rows of experts in a tensor of all experts, which are its first dimension."""
    if one.shape[1:] != entry.shape[1:] or entry.shape[0] != len(kept):
        return None
    size = one.num_bytes // one.shape[0]
    return [Span(one.file, one.offset + expert * size, size) for expert in kept]
