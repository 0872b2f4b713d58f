"""A checkpoint written with its matrices in few bits, a decoder layer at a time.

Everything that is not packed is the source's, byte for byte. What is written is read back at once;
at the end a few layers are opened as whoever loads the checkpoint opens them, and have to be the
source's layers with the matrices that were meant, bit for bit. An attempt that was broken off goes
on behind the last finished file, or where what is packed is dear behind the last finished layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from moe_lab.models.checking import check_folder
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.finishing import copy_text_files
from moe_lab.models.kept_layers import KeptLayers
from moe_lab.models.layerwise import LayerwiseModel
from moe_lab.models.matrices import WeightMatrices, WeightMatrix
from moe_lab.models.own_config import read_config, write_config
from moe_lab.models.packing import Layout
from moe_lab.models.promises import check_promises
from moe_lab.models.reading_back import NotReadBack
from moe_lab.models.shard_writer import ShardWriter
from moe_lab.models.shards import Entry, Shard, Span, layout_digest, plan_shards
from moe_lab.models.stored import STORED_DTYPES, Stored, stored_in
from moe_lab.models.weight_files import weight_files
from moe_lab.models.write_journal import JOURNAL, WriteJournal
from moe_lab.progress import progress

KEPT_LAYERS = "layers"  # beside the checkpoint, until it is whole


class WrittenForm(Protocol):
    """What is written of each matrix, such as `packed_form.PackedForm`."""

    @property
    def stock(self) -> bool: ...
    @property
    def reason(self) -> str: ...
    def layout(self, matrix: WeightMatrix) -> Layout: ...
    def parts(self, matrix: WeightMatrix, found: Any) -> dict[str, Tensor]: ...
    def read(self, matrix: WeightMatrix, parts: Mapping[str, Tensor]) -> Tensor: ...
    def meant(self, found: Any) -> Tensor: ...
    def values(self, values: Mapping[str, Any]) -> dict[str, Any]: ...


# Of a decoder layer, by its number, its packed matrices: what was found for each.
Found = Callable[[int, Sequence[WeightMatrix]], Iterable[tuple[WeightMatrix, Any]]]
Finished = Callable[[int, Mapping[str, Tensor]], None]


@dataclass
class Lost:
    """What packing took and left. squares: of all packed weights, and of what they lost."""

    matrices: int = 0
    weights: int = 0
    num_bytes: int = 0
    squares: float = 0.0
    lost: float = 0.0

    def figures(self) -> dict[str, float]:
        """Flat, for a report."""
        return {
            "packed_matrices": self.matrices,
            "packed_parameters": self.weights,
            "packed_bytes": self.num_bytes,
            "bits_per_weight": 8 * self.num_bytes / self.weights,
            "weight_error": (self.lost / self.squares) ** 0.5 if self.squares else 0.0,
        }


def write_packed(
    checkpoint: Checkpoint,
    matrices: WeightMatrices,
    chosen: Sequence[WeightMatrix],
    form: WrittenForm,
    found: Found,
    folder: Path,
    notes: MutableMapping[int, Any] | None = None,
    finished: Finished = lambda layer, read: None,
) -> Lost:
    """Write a checkpoint of which the chosen matrices are packed into `folder`; what that took.

    found: called for one decoder layer after another, in order. notes: what it says of each layer,
    by its number, in the words of JSON; where it is given, that and what was found of each layer is
    kept beside until all is written, so that a further attempt does not ask for it again, and gets
    the notes from there. finished: called behind each layer, in order, with what readers make of
    its matrices.
    """
    folder.mkdir(parents=True, exist_ok=True)
    writing = _PackedWriting(checkpoint, matrices, chosen, form, folder, notes, finished)
    return writing.write(found)


class _PackedWriting:
    """One checkpoint that is being written."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        matrices: WeightMatrices,
        chosen: Sequence[WeightMatrix],
        form: WrittenForm,
        folder: Path,
        notes: MutableMapping[int, Any] | None,
        finished: Finished,
    ):
        self.checkpoint, self.form, self.folder = checkpoint, form, folder
        self.layers: dict[int, list[WeightMatrix]] = {}
        for one in sorted(chosen, key=lambda one: one.layer):
            self.layers.setdefault(one.layer, []).append(one)
        self.stored = {
            one.key: one for file in weight_files(checkpoint.path) for one in stored_in(file)
        }
        self.journal = WriteJournal(folder.parent / JOURNAL)
        self.kept = KeptLayers(None if notes is None else folder.parent / KEPT_LAYERS)
        self.notes, self.finished = {} if notes is None else notes, finished
        self.entries = {layer: self._entries(these) for layer, these in self.layers.items()}
        self.packed = {one.key for one in chosen}
        self.rest = [one for key, one in self.stored.items() if key not in self.packed]

    def write(self, found: Found) -> Lost:
        """Everything that is not there yet."""
        shards = self._planned()
        digest = layout_digest(shards, self._made_of())
        expected: dict[int, dict[str, Tensor]] = {}
        lost = Lost()
        if not self.journal.of(digest):
            self.kept.remove()
        with ShardWriter(self.folder, shards, self.journal.done) as writer:
            writer.share_whole()
            self.journal.note(writer.done)
            left = [one for one in self.rest if writer.lacks([_entry(one)])]
            writer.copy({one.key: [_span(one)] for one in left})
            for layer in progress(list(self.layers), "quantize, layer by layer"):
                expected[layer] = self._layer(layer, writer, found, lost)
                if layer not in self._compared():
                    del expected[layer]
                self.journal.note(writer.settle())
            writer.finish()
        self._finish(expected)
        return lost

    def _layer(
        self, layer: int, writer: ShardWriter, found: Found, lost: Lost
    ) -> dict[str, Tensor]:
        """Write a decoder layer's matrices; what readers will make of them, by their keys."""
        read: dict[str, Tensor] = {}
        there: dict[str, Tensor] = {}
        if (kept := self.kept.read(layer)) is not None:
            there, self.notes[layer] = kept
        else:
            for matrix, one in found(layer, self.layers[layer]):
                parts = self.form.parts(matrix, one)
                if not torch.equal(self.form.read(matrix, parts), self.form.meant(one)):
                    raise NotReadBack(f"{matrix.key} is another matrix once packed")
                there |= _named(matrix.key, parts)
            self.kept.keep(layer, there, self.notes.get(layer))
        if writer.lacks(self.entries[layer]):
            writer.write(there)
        for matrix in self.layers[layer]:
            parts = _parts_of(matrix, self.form.layout(matrix), there)
            read[matrix.key] = self.form.read(matrix, parts)
            _count(lost, matrix, parts, read[matrix.key])
            if matrix.axis == -2:
                read[matrix.key] = read[matrix.key].mT.contiguous()
        self.finished(layer, read)
        return read

    # ------------------------------------------------------------------ what it will be

    def _entries(self, matrices: Sequence[WeightMatrix]) -> list[Entry]:
        return [
            Entry(_name(matrix.key, part), dtype, shape)
            for matrix in matrices
            for part, (dtype, shape) in self.form.layout(matrix).items()
        ]

    def _planned(self) -> list[Shard]:
        """The rest first, then layer by layer; whole files of which nothing is packed."""
        held = {key: one.file for key, one in self.stored.items()}
        files, touched = weight_files(self.checkpoint.path), {held[key] for key in self.packed}
        whole = [file for file in files if len(files) > 1 and file not in touched]
        rest = [_entry(one) for one in self.rest]
        return plan_shards([rest, *self.entries.values()], whole, held)

    def _made_of(self) -> str:
        return f"{self.checkpoint.path} {self.checkpoint.fingerprint}"

    def _compared(self) -> set[int]:
        """The layers that are opened at the end: the first and the last."""
        return {min(self.layers), max(self.layers)}

    # ------------------------------------------------------------------ the end

    def _finish(self, expected: Mapping[int, Mapping[str, Tensor]]) -> None:
        source = self.checkpoint.path
        values = self.form.values(read_config(source / "config.json"))
        write_config(self.folder / "config.json", values)
        copy_text_files(source, self.folder)
        check_folder(self.folder)
        self._compare(expected)
        check_promises(self.folder, source)
        self.journal.remove()
        self.kept.remove()

    def _compare(self, expected: Mapping[int, Mapping[str, Tensor]]) -> None:
        instead = {key: one for layer in expected.values() for key, one in layer.items()}
        meant = LayerwiseModel(self.checkpoint, instead=instead)
        read = LayerwiseModel(Checkpoint(self.folder, self.checkpoint.dtype))
        for layer in expected:
            with meant.layer(layer) as wanted, read.layer(layer) as there:
                tensors = dict(there.named_parameters())
                for name, one in wanted.named_parameters():
                    if not torch.equal(one, tensors[name]):
                        raise NotReadBack(
                            f"{self.folder} was read back, and {name} of layer {layer} is another "
                            "tensor than was meant. Please report it"
                        )


def _count(lost: Lost, matrix: WeightMatrix, parts: Mapping[str, Tensor], read: Tensor) -> None:
    weight = matrix.load()
    lost.matrices += 1
    lost.weights += matrix.num_weights
    lost.num_bytes += sum(part.numel() * part.element_size() for part in parts.values())
    lost.squares += float(weight.float().square().sum(dtype=torch.float64))
    lost.lost += float((weight.float() - read.float()).square().sum(dtype=torch.float64))


def _name(key: str, part: str) -> str:
    return f"{key}_{part}" if part else key


def _named(key: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {_name(key, part): tensor for part, tensor in parts.items()}


def _parts_of(
    matrix: WeightMatrix, layout: Layout, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    return {part: tensors[_name(matrix.key, part)] for part in layout}


def _entry(one: Stored) -> Entry:
    return Entry(one.key, STORED_DTYPES[one.kind], one.shape)


def _span(one: Stored) -> Span:
    return Span(one.file, one.offset, one.num_bytes)
