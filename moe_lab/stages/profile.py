"""Profile: statistics of a model on the calibration set, in one pass, by group where asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from moe_lab.compute import Compute
from moe_lab.data.tokens import Tokens
from moe_lab.dependencies import code_version
from moe_lab.methods.base import Method
from moe_lab.methods.metrics.base import names_from_routers
from moe_lab.models import layers, observing, remapped, routers
from moe_lab.models.activations import Activations
from moe_lab.models.checkpoint import Checkpoint, meta_model
from moe_lab.models.layers import num_parameters
from moe_lab.models.layerwise import LayerwiseModel, computing_dtype
from moe_lab.models.stream import LayerStream
from moe_lab.profile import collect, layer, weights
from moe_lab.profile.collect import Collection
from moe_lab.progress import progress
from moe_lab.store import Artifact, Store, key_of
from moe_lab.types import UserError

Batches = Sequence[tuple[int, dict[str, Tensor]]]


def check_profile(compute: Compute, method: Method) -> None:
    """Refuse a profile of the routers alone where the method needs more."""
    if compute.profile == "routers" and not getattr(method, "from_routers", False):
        raise UserError(
            "compute.profile=routers is enough for method=prune with metric="
            f"{', '.join(names_from_routers())}, and for method=none; what was asked for "
            "needs the experts' outputs too: compute.profile=all"
        )


def profile(store: Store, checkpoint: Checkpoint, tokens: Tokens, compute: Compute) -> Artifact:
    """A folder with one safetensors file of sums per MoE layer, and the same for each group.

    What is collected, and whether layer by layer, are resources: the key is
    that of all statistics, since those of the routers are the same values.
    """
    identity = {
        "model": checkpoint.fingerprint,
        "dtype": checkpoint.dtype,
        "data": tokens.fingerprint,
        "code": code_version(collect, layer, weights, observing, routers, layers, remapped),
    }
    only_routers = compute.profile == "routers" and store.find("profile", identity) is None

    def make(folder: Path) -> None:
        parts = tokens.by_group()
        batches = [
            (number, batch)
            for number, part in enumerate(parts.values())
            for batch in part.batches(compute.batch_size, compute.device)
        ]
        collection = collect_profile(checkpoint, batches, only_routers, compute, store.root)
        groups = [collection.of_group(number) for number in range(len(parts))]
        collect.save_statistics(collect.added(groups), folder)
        if tokens.groups:
            collect.save_groups(dict(zip(parts, groups, strict=True)), folder)

    collected = {"statistics": "routers"} if only_routers else {}
    return replace(store.get("profile", identity | collected, make), key=key_of(identity))


def collect_profile(
    checkpoint: Checkpoint, batches: Batches, only_routers: bool, compute: Compute, folder: Path
) -> Collection:
    """The statistics of all batches, each with its group's number before it.

    folder: for hidden states that outgrow compute.cache_gib, where it goes layer by layer.
    """
    dtype = computing_dtype(checkpoint)
    size = num_parameters(meta_model(checkpoint.config)) * dtype.itemsize
    if not compute.goes_layerwise(size):
        model = checkpoint.load(compute.device)
        return collect.collect_by_group(model, progress(batches, "profile"), only_routers)
    cache = Activations(int(compute.cache_gib * 2**30), folder, compute.device)
    layerwise = LayerwiseModel(checkpoint, compute.device)
    stream = LayerStream(layerwise, (batch for _, batch in batches), cache)
    return _layer_by_layer(stream, [group for group, _ in batches], only_routers)


def _layer_by_layer(stream: LayerStream, groups: Sequence[int], only_routers: bool) -> Collection:
    """Decoder layer after decoder layer over all batches; the cached states advance with it."""
    stream.cache.announce({"hidden states": stream.state_bytes()})
    with collect.collecting(stream.model, only_routers) as collection:
        for index in progress(range(max(stream.moe) + 1), "profile, layer by layer"):
            with stream.layer(index):
                for number, group in enumerate(groups):
                    with collection.batch(stream.valid[number], group):
                        hidden = stream.replay(index, number, stream.cache["input", number])
                        stream.cache["input", number] = hidden
    return collection
