"""A plan carried out on a checkpoint's files, one decoder layer in memory at a time.

What the result is, tensor by tensor, is found on a model without weights. Then each decoder layer
is read, edited, brought into the result's form and written; files of which nothing changes are
shared with the source. On the way a few tokens go through the edited layers: the written checkpoint
is read back layer by layer, and has to give the same logits. An attempt that was broken off goes on
behind the last finished file.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_lab.models.checkpoint import Checkpoint, meta_model
from moe_lab.models.condensing import edited_blocks
from moe_lab.models.edited_model import REST, EditedModel, Saving, meta_twin
from moe_lab.models.editing import set_block
from moe_lab.models.edits.plan import Plan, apply_chain
from moe_lab.models.finishing import Saved, finish_checkpoint, write_configs
from moe_lab.models.forms import Form
from moe_lab.models.head import untie_head
from moe_lab.models.in_form import fill_up_layer, native_block
from moe_lab.models.layers import MoELayer, moe_layers
from moe_lab.models.layerwise import LayerSource, LayerwiseModel, bytes_of
from moe_lab.models.narrowing import fit_implementation
from moe_lab.models.native_dense import dense_names
from moe_lab.models.reading_back import check_logits, compare_by_layer
from moe_lab.models.shard_writer import ShardWriter
from moe_lab.models.shards import (
    DTYPE_NAMES,
    Entry,
    Shard,
    Span,
    layout_digest,
    plan_shards,
)
from moe_lab.models.stored import (
    in_stored_dtypes,
    round_to_stored,
    stored_in,
    without_tied,
)
from moe_lab.models.superset import SUPERSETS
from moe_lab.models.verbatim import Moved, Spans, spans_of
from moe_lab.models.weight_files import weight_files
from moe_lab.models.write_journal import JOURNAL, Replay, WriteJournal
from moe_lab.progress import progress

logger = logging.getLogger(__name__)

CHECKED_BYTES = 2**30  # of so many bytes decoder layers are compared by what they compute


def write_edited(checkpoint: Checkpoint, plan: Plan, folder: Path, how: Saving) -> Form:
    """Write the checkpoint that a plan makes of another one into `folder`; its form.

    Memory: what is no decoder layer, and a decoder layer before and behind its edits. Beside the
    folder lies what a further attempt goes on from, until all is written and read back.
    """
    folder.mkdir(parents=True, exist_ok=True)
    journal = WriteJournal(folder.parent / JOURNAL)
    source = LayerwiseModel(checkpoint)
    form = _Writing(source, checkpoint, plan, how).write(folder, journal)
    journal.remove()
    return form


def write_model(source: LayerSource, folder: Path, origin: Path, how: Saving) -> Form:
    """Write a model whose decoder layers can be had one by one as a checkpoint; its form.

    origin: the checkpoint that it came from, whose tokenizer and dtypes it gets. Each decoder layer
    is opened once, in order. The model is not changed but for its config, and the rounding and the
    form of its layers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(source.model.config, "distinct_experts"):  # its copies may be edited by now
        del source.model.config.distinct_experts
    writing = _Writing(source, Checkpoint(origin), Plan(()), how, meta_twin(source.model))
    return writing.write(folder, WriteJournal(None))


class _Writing:
    """One checkpoint that is being written.

    checkpoint: what the source is, or what it was made from. changed: the source's model without
    weights, where it is another one than the checkpoint's; then nothing is known to be as it was.
    """

    def __init__(
        self,
        source: LayerSource,
        checkpoint: Checkpoint,
        plan: Plan,
        how: Saving,
        changed: PreTrainedModel | None = None,
    ):
        self.source, self.checkpoint, self.plan, self.how = source, checkpoint, plan, how
        self.before = meta_model(checkpoint.config)
        self.family = source.model.config.model_type
        self.is_changed = changed is not None
        built = changed or meta_model(checkpoint.config)
        form = how.form_of(source.model) if changed and how.twins else None
        self.outcome = EditedModel(built, plan.edited(), how, form)
        self.files = checkpoint.held_by(self.before)
        self.stored = {one.key: one for parts in self.files.by_name.values() for one in parts}
        self.default = getattr(checkpoint.config, "dtype", None) or self.source.dtype
        self.layers = {layer.info.index: layer for layer in moe_layers(self.source.model)}
        self.chains = {chain.index: chain for chain in plan.chains() if chain.changes}
        self._set_dtypes()
        self._fill_rest()
        self.head = untie_head(self.outcome.model, how.lm_head, self.outcome.form)
        self.entries = {REST: self._entries(self._rest_in_files())}
        for old, new in self.outcome.numbers.items():
            self.entries[old] = self._entries(self.outcome.in_files(self.outcome.piece(new)))
        self.spans = {old: {} if changed else self._spans(old) for old in self.outcome.numbers}

    def write(self, folder: Path, journal: WriteJournal) -> Form:
        """Everything, from the first layer that is not there yet."""
        form = self.outcome.form
        if not form.plain:
            logger.info("saving: %s", form.reason)
        shards = self._planned()
        journal.of(layout_digest(shards, self._made_of()))
        replay = Replay(self.source, self.outcome.numbers, self._compared(), journal)
        with ShardWriter(folder, shards, journal.done) as writer:
            if ways := writer.share_whole():
                logger.info("%d files of the source are the result's as they are: %s", *ways)
            if writer.lacks(self.entries[REST]):
                writer.write(self._rest_in_files())
            for old in progress(list(self.outcome.numbers), "compress, layer by layer"):
                self._through(old, writer, replay)
                journal.note(writer.settle(), replay)
            writer.finish()
        expected = replay.logits()
        if expected is not None:
            check_logits(expected, self.source.dtype)
        return self._finished(folder, expected, replay.checked)

    def _through(self, old: int, writer: ShardWriter, replay: Replay) -> None:
        """Write what is left to write of a decoder layer, and take the few tokens through it."""
        entries, copied = self.entries[old], self.spans[old]
        if writer.lacks(entries):
            writer.copy({key: some for spans in copied.values() for key, some in spans.items()})
        if not (writer.lacks(entries) or replay.awaits(old)):
            return
        chain = self.chains.get(old)
        names = {self.outcome.old_name(name) for name in copied}
        if chain is not None and chain.keeps_rows:
            names = set()  # what stands for experts is made where these are
        with self.source.layer(old, without=() if replay.awaits(old) else names):
            self._edit(old)
            replay.through(old)
            if writer.lacks(entries):
                left = {n: t for n, t in self._tensors(old).items() if n not in copied}
                writer.write(self.outcome.in_files(left))

    # ------------------------------------------------------------------ what it will be

    def _set_dtypes(self) -> None:
        """Give the result's tensors, which have no values yet, the dtypes of the files."""
        for name, tensor in self.outcome.model.state_dict(keep_vars=True).items():
            if tensor.is_floating_point():
                stored = self.files.dtype(self.outcome.old_name(name))
                tensor.data = tensor.data.to(stored or self.default)

    def _fill_rest(self) -> None:
        """Put what is no decoder layer into the result's model, as it is stored."""
        tensors = {
            name: tensor
            for name, tensor in tensors_in_files(self.source.model)
            if self.outcome.index_of(name) == REST
        }
        first = {id(tensor): name for name, tensor in reversed(tensors.items())}  # of tied ones
        once = {name: tensors[name] for name in first.values()}
        round_to_stored(self.source.model, once, self.files, self.default, self.source.dtype)
        stored = in_stored_dtypes(tensors, self.files, self.default)
        self.outcome.model.load_state_dict(stored, strict=False, assign=True)
        self.outcome.model.tie_weights()

    def _rest_in_files(self) -> dict[str, Tensor]:
        model = self.outcome.model
        tensors = {name: tensor.detach() for name, tensor in self.outcome.piece(REST).items()}
        return self.outcome.in_files(without_tied(model, tensors))

    def _planned(self) -> list[Shard]:
        held = {key: one.file for key, one in self.stored.items()}
        return plan_shards(self.entries.values(), self._whole_files(), held)

    def _entries(self, tensors: Mapping[str, Tensor]) -> list[Entry]:
        return [Entry.of(name, tensor) for name, tensor in tensors.items()]

    def _spans(self, old: int) -> dict[str, Spans]:
        """Of a decoder layer: the bytes of the source that are the result's, by tensors' names.

        Names are those of the result's model.
        """
        new, chain = self.outcome.numbers[old], self.chains.get(old)
        moved = Moved(old, new, chain, self.layers.get(old))
        found: dict[str, Spans] = {}
        for name, tensor in self.outcome.piece(new).items():
            if entries := self._entries_of(old, name, tensor):
                spans = spans_of(moved, self.outcome.old_name(name), entries, self.files)
                if spans is not None:
                    found[name] = spans
        return found

    def _entries_of(self, old: int, name: str, tensor: Tensor) -> list[Entry]:
        """What stands of one tensor of a decoder layer in the files; nothing known: none.

        Some are written together with others, which transformers cannot do of one alone.
        """
        try:
            entries = self._entries(self.outcome.in_files({name: tensor}))
        except (RuntimeError, ValueError, LookupError):
            return []
        return entries if set(entries) <= set(self.entries[old]) else []

    def _whole_files(self) -> list[Path]:
        """The files of the source of which every tensor is in the result as it is there.

        Only where it has several files.
        """
        files = weight_files(self.checkpoint.path)
        if self.is_changed or len(files) == 1:
            return []
        every = [item for spans in self.spans.values() for one in spans.values()
                 for item in one.items()]  # fmt: skip
        same = {key for key, spans in every if list(spans) == [self._place_of(key)]}
        same |= {entry.name for entry in self.entries[REST] if self._is_stored(entry)}
        return [file for file in files if {one.key for one in stored_in(file)} <= same]

    def _is_stored(self, entry: Entry) -> bool:
        """Whether the source has a tensor of this name, dtype and shape."""
        one = self.stored.get(entry.name)
        if one is None or one.parts:
            return False
        return (one.kind, one.shape) == (DTYPE_NAMES[entry.dtype], entry.shape)

    def _place_of(self, key: str) -> Span | None:
        """Where a tensor of this name is in the source."""
        one = self.stored.get(key)
        return Span(one.file, one.offset, one.num_bytes) if one else None

    def _made_of(self) -> str:
        """The source and the plan, in words that tell them from others written to the same place.

        What is in the plan's tensors is not looked at: they come with its text.
        """
        return f"{self.checkpoint.path} {self.source.dtype} {self.plan.to_text()}"

    def _compared(self) -> list[int]:
        """The decoder layers through which the few tokens go, by their old numbers.

        The first of each kind of edits, the last that is edited, then others: as many as a bound
        in bytes allows.
        """
        staying = [old for old in self.outcome.numbers if old in self.chains]
        kinds = {tuple(e.kind for e in self.chains[old].edits): old for old in reversed(staying)}
        order = [*sorted(kinds.values()), *staying[-1:], *self.outcome.numbers]
        left, found = CHECKED_BYTES, list[int]()
        for old in dict.fromkeys(order):
            left -= bytes_of(self.source.layers[old])
            if left >= 0 or old in kinds.values():
                found.append(old)
        return sorted(found)

    # ------------------------------------------------------------------ one layer

    def _edit(self, old: int) -> None:
        """Carry out the plan's edits of a decoder layer, which is open; round as files will."""
        if old in self.chains:
            apply_chain(self.source.model, self.layers[old], self.chains[old], self.plan)
            fit_implementation(self.source.model)
        there = {name: tensor for name, tensor in self._part(old).items() if not tensor.is_meta}
        round_to_stored(self.source.model, there, self.files, self.default, self.source.dtype)

    def _part(self, old: int) -> dict[str, Tensor]:
        prefix = f"{self.outcome.path}.{old}."
        return {
            f"{prefix}{key}": tensor for key, tensor in tensors_in_files(self.source.layers[old])
        }

    @torch.no_grad()
    def _tensors(self, old: int) -> dict[str, Tensor]:
        """The tensors of an edited decoder layer in the result's form, by their names there."""
        self._in_form(old)
        new = self.outcome.numbers[old]
        there = {name: tensor for name, tensor in self._part(old).items() if not tensor.is_meta}
        stored = in_stored_dtypes(there, self.files, self.default)
        before, behind = (f"{self.outcome.path}.{number}." for number in (old, new))
        found = {f"{behind}{name.removeprefix(before)}": t for name, t in stored.items()}
        for name, planned in self.outcome.piece(new).items():
            if name not in found and self._is_empty(name):
                found[name] = torch.zeros(planned.shape, dtype=planned.dtype)
        return {name: tensor.detach() for name, tensor in found.items()}

    def _in_form(self, old: int) -> None:
        """What `in_form` does to a whole model, to one decoder layer with its weights."""
        form, model, result = self.outcome.form, self.source.model, self.outcome.model
        if not form.stock:
            return
        path = f"{self.outcome.path}.{old}"
        if layer := _moe_layer_at(model, path):
            fill_up_layer(layer, form)
        if not self.outcome.has_edited_blocks:
            return
        decoder = model.get_submodule(path)
        inside = dense_names(decoder) | set(edited_blocks(decoder))
        for name in inside:
            built = result.get_submodule(f"{self.outcome.path}.{self.outcome.numbers[old]}.{name}")
            block = native_block(model, f"{path}.{name}", copy.deepcopy(built))
            set_block(model, f"{path}.{name}", block)

    def _is_empty(self, name: str) -> bool:
        """Whether a tensor is zeros that another family's form has, and the model had not."""
        superset = SUPERSETS.get(self.family)
        converted = self.outcome.form.config.model_type != self.family
        return bool(converted and superset and any(part in name for part in superset.empty))

    # ------------------------------------------------------------------ the end

    def _finished(self, folder: Path, expected: Tensor | None, compared: Sequence[int]) -> Form:
        model = self.outcome.model
        saved = Saved(model, self.before, self.files, self.checkpoint.path, folder)

        def read_back() -> None:
            if expected is None:
                logger.warning(
                    "what was written is compared tensor by tensor, and not by logits: this family "
                    "cannot go layer by layer"
                )
            else:
                numbers = [self.outcome.numbers[old] for old in compared]
                compare_by_layer(folder, expected, self.source.dtype, numbers)

        write_configs(model, folder)
        return finish_checkpoint(saved, self.outcome.form, self.how.mtp, self.head, read_back)


def _moe_layer_at(model: PreTrainedModel, path: str) -> MoELayer | None:
    found = (layer for layer in moe_layers(model) if f"{layer.info.name}.".startswith(f"{path}."))
    return next(found, None)


def tensors_in_files(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint has of a module: its parameters, and its buffers that are not computed.

    Not by `state_dict`, which divided modules answer with their parts.
    """
    for path, part in module.named_modules():
        before = f"{path}." if path else ""
        for key, tensor in [*part._parameters.items(), *part._buffers.items()]:
            if tensor is not None and key not in part._non_persistent_buffers_set:
                yield f"{before}{key}", tensor
