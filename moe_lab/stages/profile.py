"""Profile: statistics of a model on the calibration set, in one pass, by group where asked."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_lab import processes, stopping
from moe_lab.compute import Compute
from moe_lab.data.tokens import Tokens
from moe_lab.dependencies import code_version
from moe_lab.files import LAYERS, USAGE
from moe_lab.integrity import flush
from moe_lab.models.activations import Activations
from moe_lab.models.checkpoint import Checkpoint, Model, meta_model
from moe_lab.models.handed_on import NotLayerwise
from moe_lab.models.layers import num_parameters
from moe_lab.models.layerwise import LayerwiseModel, computing_dtype
from moe_lab.models.opening import stored_dtype, text_config
from moe_lab.models.stream import LayerStream
from moe_lab.profile import collect
from moe_lab.profile.collect import Collection
from moe_lab.profile.layer import LayerStatistics
from moe_lab.progress import progress
from moe_lab.stages import profile_needs
from moe_lab.stages.context import Context
from moe_lab.stages.journal import Journal, Progress, statistics
from moe_lab.stages.stage import Stage
from moe_lab.store import Artifact, key_of
from moe_lab.types import LayerInfo

if TYPE_CHECKING:
    from moe_lab.stages.run import Run

logger = logging.getLogger(__name__)
Batches = Sequence[tuple[int, dict[str, Tensor]]]
UNEVEN = 1.25  # of the mean: a process that has more than so much to do is told of


@dataclass(frozen=True)
class Profiling:
    """A model, and the calibration set; neurons: whether hidden units are asked for, too."""

    checkpoint: Checkpoint
    tokens: Tokens
    neurons: bool = False


def profile(context: Context, asked: Profiling) -> Artifact:
    """A folder with one safetensors file of sums per MoE layer, and the same for each group.

    What is collected, and whether layer by layer, are resources: the key is that of all
    statistics, since those of the routers alone, or of hidden units beside, are the same values.
    """
    checkpoint, tokens, compute = asked.checkpoint, asked.tokens, context.compute
    identity = {
        "model": checkpoint.fingerprint,
        "dtype": checkpoint.dtype,
        "data": tokens.fingerprint,
        "code": code_version(profile),
    }
    store, key = context.store, key_of(identity)
    known = None if asked.neurons else store.find("profile", identity)
    if known := known or store.find("profile", identity | {"statistics": "neurons"}):
        return replace(known, key=key)
    only_routers = compute.profile == "routers"

    def make(folder: Path) -> None:
        if processes.broadcast(processes.is_main() and _is_whole(folder)):
            return  # a killed attempt lacked the seal alone
        parts = tokens.by_group()
        batches = shared(
            [
                (number, batch)
                for number, part in enumerate(parts.values())
                for batch in part.batches(compute.batch_size, compute.device, compute.batch_tokens)
            ]
        )
        journals = [folder / f"journal.{index}" for index in range(processes.number())]
        for other in set(folder.glob("journal.*")) - set(journals):  # of more processes
            shutil.rmtree(other, ignore_errors=True)
        of = {"batches": _shapes(batches), "processes": len(journals)}
        journal = Journal(journals[processes.index()], compute.journal_seconds, of)
        collect_profile(
            checkpoint, batches, only_routers, compute, journal.spilled, asked.neurons, journal
        )
        processes.wait()
        if processes.is_main():
            _finish(folder, journals, list(parts) if tokens.groups else [])

    collected = "routers" if only_routers else "neurons" if asked.neurons else None
    also = {"statistics": collected} if collected else {}
    return replace(store.get("profile", identity | also, make, together=True), key=key)


def shared(batches: Batches) -> Batches:
    """This process's part of the batches: each has about as many tokens."""
    number = processes.number()
    loads, parts = [0] * number, [list[int]() for _ in range(number)]
    sizes = [batch["input_ids"].numel() for _, batch in batches]
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        least = loads.index(min(loads))
        loads[least] += sizes[place]
        parts[least].append(place)
    if max(loads) > UNEVEN * sum(loads) / number and processes.is_main():
        logger.info(
            "%d processes share %d batches of %d tokens, of which one gets %d: smaller ones share "
            "better (compute.batch_size, compute.batch_tokens)",
            number, len(batches), sum(loads), max(loads),
        )  # fmt: skip
    return [batches[place] for place in sorted(parts[processes.index()])]


def _shapes(batches: Batches) -> list[tuple[int, int, int]]:
    """Of each batch: its group, and how many samples and tokens of each it has."""
    return [(group, *batch["input_ids"].shape[:2]) for group, batch in batches]


def collect_profile(
    checkpoint: Checkpoint,
    batches: Batches,
    only_routers: bool,
    compute: Compute,
    folder: Path,
    neurons: bool = False,
    journal: Journal | None = None,
) -> Collection:
    """The statistics of all batches, each with its group's number before it.

    neurons: those of hidden units, too. folder: for hidden states that outgrow
    compute.cache_gib, where it goes layer by layer. journal: goes on where a killed attempt was;
    complete sums are in it, and not in what is returned.
    """
    empty, dtype = meta_model(checkpoint.config), computing_dtype(checkpoint)
    size = num_parameters(empty) * dtype.itemsize
    tokens = sum(batch["input_ids"].numel() for _, batch in batches)
    states = tokens * text_config(empty.config).hidden_size * dtype.itemsize
    if compute.profiles_layerwise(size, states):
        try:
            return _collect_by_layer(
                checkpoint, empty, batches, only_routers, compute, folder, neurons, journal
            )
        except NotLayerwise:
            if compute.goes_layerwise(size):
                raise
    model = checkpoint.load(compute.device)
    with collect.collecting(model, only_routers, neurons) as collection:
        _whole(model, collection, batches, journal)
    return collection


def _collect_by_layer(
    checkpoint: Checkpoint,
    empty: Model,
    batches: Batches,
    only_routers: bool,
    compute: Compute,
    folder: Path,
    neurons: bool,
    journal: Journal | None,
) -> Collection:
    """The same with one decoder layer in memory; empty: the model without weights."""
    dtype = computing_dtype(checkpoint)
    if journal and batches:
        asked = profile_needs.request_of(_shapes(batches), compute, neurons)
        converted = dtype != stored_dtype(checkpoint.config)
        needed = profile_needs.bounds_of(empty, dtype.itemsize, asked, converted)
        profile_needs.check_needs(needed, asked, compute, folder)
    limit, on_device = int(compute.cache_gib * 2**30), compute.device_cache()
    cache = Activations(limit, folder, compute.device, on_device)
    layerwise = LayerwiseModel(checkpoint, compute.device)
    stream = LayerStream(layerwise, (batch for _, batch in batches), cache)
    with collect.collecting(stream.model, only_routers, neurons) as collection:
        if batches:
            _layer_by_layer(stream, collection, [group for group, _ in batches], journal)
    return collection


def _whole(model: Model, collection: Collection, batches: Batches, journal: Journal | None) -> None:
    """Batch after batch through the whole model."""
    done = journal.resume(collection, len(batches)) if journal else Progress()
    first = max(done.counted.values(), default=0)
    for number, (group, batch) in enumerate(progress(batches, "profile")):
        if number < first:
            continue
        with stopping.hold():
            collect.collect_batch(collection, model, batch, group)
            done.counted = dict.fromkeys(collection.layers, number + 1)
        if number + 1 == len(batches):
            collection.check_finite()  # before a save says that all is done
        if journal:
            journal.offer(done, collection)
    if journal:
        for index in collection.layers:
            journal.keep(collection.take(index), len(batches))
        journal.close(done)


def _layer_by_layer(
    stream: LayerStream, collection: Collection, groups: Sequence[int], journal: Journal | None
) -> None:
    """Decoder layer after decoder layer over all batches; the cached states advance with it."""
    stream.cache.announce({"hidden states": stream.state_bytes()})
    number, last = len(groups), max(stream.moe)
    done = journal.resume(collection, number, stream) if journal else Progress([0] * number)
    for index in progress(range(last + 1), "profile, layer by layer"):
        batches = [batch for batch, at in enumerate(done.at) if at == index]
        if not batches:
            continue
        counted = done.counted.get(index, 0)
        with stream.layer(index, then=_next(done, index, last)):
            for batch in batches:
                with stopping.hold():
                    counts = index in stream.moe and batch >= counted
                    _through_layer(stream, collection, index, batch, groups[batch], counts)
                    done.at[batch] = index + 1
                    if index in stream.moe:
                        done.counted[index] = max(counted, batch + 1)
                if batch == batches[-1]:
                    collection.check_finite(index)  # before a save says that it is done
                    if journal:
                        journal.keep(collection.take(index), done.counted.get(index, 0))
                if journal:
                    journal.offer(done, collection, stream)
    if journal:
        journal.close(done)


def _through_layer(
    stream: LayerStream, collection: Collection, index: int, batch: int, group: int, counts: bool
) -> None:
    """One batch's hidden state through a layer, which is open; counts: into the statistics."""
    with collection.batch(stream.valid[batch], group, counts):
        hidden = stream.replay(index, batch, stream.cache["input", batch])
        stream.cache["input", batch] = hidden


def _next(done: Progress, index: int, last: int) -> int | None:
    """The decoder layer that is needed behind this one; None behind the last."""
    return min((max(at, index + 1) for at in done.at if max(at, index + 1) <= last), default=None)


def _finish(folder: Path, journals: Sequence[Path], groups: Sequence[str]) -> None:
    """Write the result out of the journals, which go: the list of layers, written last, ends it."""
    parts = {name: statistics(journals, number) for number, name in enumerate(groups)}
    if groups:
        collect.save_groups(parts, folder)
    collect.save_statistics(statistics(journals), folder)
    for file in folder.rglob("*"):
        flush(file)
    for journal in folder.glob("journal.*"):
        shutil.rmtree(journal)


def _is_whole(folder: Path) -> bool:
    """Whether `_finish` came to its end here; the store did not, or nobody would ask."""
    if not (folder / LAYERS).is_file():
        return False
    try:
        for layer in json.loads((folder / LAYERS).read_text()):
            with safe_open(folder / f"layer_{layer['index']:03d}.safetensors", "pt"):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    for journal in folder.glob("journal.*"):
        shutil.rmtree(journal, ignore_errors=True)
    return True


def write_usage(profiled: Artifact, folder: Path) -> None:
    """Put usage.csv into the run's folder: layer, expert, tokens, and usage, 1 being even."""
    rows = ["layer,expert,tokens,usage"]
    for values in json.loads((profiled.folder / LAYERS).read_text()):
        info = LayerInfo(**values)
        path = profiled.folder / f"layer_{info.index:03d}.safetensors"
        with safe_open(path, framework="pt") as file:  # two of the sums, of which some are large
            sums = {name: file.get_tensor(name) for name in ("count", "tokens")}
        usage = LayerStatistics(info, sums).usage()
        rows += [
            f"{info.index},{expert},{tokens:.0f},{share:.6g}"
            for expert, (tokens, share) in enumerate(
                zip(sums["count"].tolist(), usage.tolist(), strict=True)
            )
        ]
    (folder / USAGE).write_text("\n".join(rows) + "\n")


def _inputs(run: Run) -> dict[str, Profiling]:
    neurons = run.parts.method.of_neurons
    return {"profile": Profiling(run.dense, run.texts["calibration"], neurons)}


def _read(run: Run, name: str, result: Artifact) -> None:
    write_usage(result, run.folder)


STAGE = Stage(_inputs, profile, _read)
