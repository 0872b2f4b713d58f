"""Profile: statistics of a model on the calibration set, in one pass, by group where asked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open
from torch import Tensor

from moe_lab.compute import Compute
from moe_lab.data.tokens import Tokens
from moe_lab.dependencies import code_version
from moe_lab.files import LAYERS, USAGE
from moe_lab.models.activations import Activations
from moe_lab.models.checkpoint import Checkpoint, meta_model
from moe_lab.models.layers import num_parameters
from moe_lab.models.layerwise import LayerwiseModel, computing_dtype
from moe_lab.models.stream import LayerStream
from moe_lab.profile import collect
from moe_lab.profile.collect import Collection
from moe_lab.profile.layer import LayerStatistics
from moe_lab.progress import progress
from moe_lab.stages.context import Context
from moe_lab.stages.stage import Stage
from moe_lab.store import Artifact, key_of
from moe_lab.types import LayerInfo

if TYPE_CHECKING:
    from moe_lab.stages.run import Run

Batches = Sequence[tuple[int, dict[str, Tensor]]]


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
        parts = tokens.by_group()
        batches = [
            (number, batch)
            for number, part in enumerate(parts.values())
            for batch in part.batches(compute.batch_size, compute.device)
        ]
        root = store.root
        collection = collect_profile(
            checkpoint, batches, only_routers, compute, root, asked.neurons
        )
        groups = [collection.of_group(number) for number in range(len(parts))]
        collect.save_statistics(collect.added(groups), folder)
        if tokens.groups:
            collect.save_groups(dict(zip(parts, groups, strict=True)), folder)

    collected = "routers" if only_routers else "neurons" if asked.neurons else None
    also = {"statistics": collected} if collected else {}
    return replace(store.get("profile", identity | also, make), key=key)


def collect_profile(
    checkpoint: Checkpoint,
    batches: Batches,
    only_routers: bool,
    compute: Compute,
    folder: Path,
    neurons: bool = False,
) -> Collection:
    """The statistics of all batches, each with its group's number before it.

    neurons: those of hidden units, too. folder: for hidden states that outgrow
    compute.cache_gib, where it goes layer by layer.
    """
    dtype = computing_dtype(checkpoint)
    size = num_parameters(meta_model(checkpoint.config)) * dtype.itemsize
    if not compute.goes_layerwise(size):
        model = checkpoint.load(compute.device)
        return collect.collect_by_group(model, progress(batches, "profile"), only_routers, neurons)
    cache = Activations(int(compute.cache_gib * 2**30), folder, compute.device)
    layerwise = LayerwiseModel(checkpoint, compute.device)
    stream = LayerStream(layerwise, (batch for _, batch in batches), cache)
    return _layer_by_layer(stream, [group for group, _ in batches], only_routers, neurons)


def _layer_by_layer(
    stream: LayerStream, groups: Sequence[int], only_routers: bool, neurons: bool
) -> Collection:
    """Decoder layer after decoder layer over all batches; the cached states advance with it."""
    stream.cache.announce({"hidden states": stream.state_bytes()})
    with collect.collecting(stream.model, only_routers, neurons) as collection:
        for index in progress(range(max(stream.moe) + 1), "profile, layer by layer"):
            with stream.layer(index):
                for number, group in enumerate(groups):
                    with collection.batch(stream.valid[number], group):
                        hidden = stream.replay(index, number, stream.cache["input", number])
                        stream.cache["input", number] = hidden
            collection.check_finite(index)
    return collection


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
