"""What one pass over the calibration set collects at each MoE layer.

Collecting the sums of each layer (`LayerStatistics`), adding up those of parts of the data, and
keeping them on disk.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_lab.files import LAYERS
from moe_lab.models.checkpoint import Model
from moe_lab.models.layers import MoELayer, moe_layers
from moe_lab.models.observing import (
    AllRouted,
    Observation,
    RoutersObservation,
    observe,
    observe_routers,
)
from moe_lab.models.routers import scoring
from moe_lab.profile.layer import CONSTANTS, OF_NEURONS, SHARED, LayerStatistics, combined
from moe_lab.profile.weights import neuron_statistics, weight_statistics
from moe_lab.types import LayerInfo, Routing

GROUPS = "groups.json"


class Collection:
    """The statistics that an open pass collects, split by group."""

    def __init__(
        self,
        layers: Iterable[MoELayer],
        observation: Observation | RoutersObservation,
        neurons: bool = False,
    ):
        self.neurons = neurons
        self.layers = {layer.info.index: layer for layer in layers}
        self.observation = observation
        self.group = 0
        self.counts = True
        self.found: dict[tuple[int, int], LayerStatistics] = {}

    @contextmanager
    def batch(self, valid: Tensor, group: int = 0, counts: bool = True) -> Iterator[None]:
        """Around the computation of one batch of one group; valid: [B, L] bool.

        counts: False where the batch is computed as ever, but nothing is added.
        """
        self.observation.valid, self.group, self.counts = valid, group, counts
        with suppress(AllRouted):
            yield

    def of(self, index: int) -> LayerStatistics:
        """What the current group's statistics of a layer, whose weights are in memory, add to."""
        key = self.group, index
        if key not in self.found:
            layer = self.layers[index]
            self.found[key] = LayerStatistics(layer.info, self._constants(layer), scoring(layer))
        return self.found[key]

    def _constants(self, layer: MoELayer) -> dict[str, Tensor]:
        """What is read off the layer's weights, once for all groups."""
        known = [one for (_, index), one in self.found.items() if index == layer.info.index]
        if known:
            held = known[0].sums
            every = (*CONSTANTS, *OF_NEURONS, *(SHARED + name for name in OF_NEURONS))
            return {name: held[name] for name in every if name in held}
        of_neurons = neuron_statistics(layer) if self.neurons else {}
        return weight_statistics(layer) | of_neurons

    def check_finite(self, index: int | None = None) -> None:
        """Refuse numbers that are none, in the first layer that has some; index: of one layer."""
        for group, one in sorted(self.found, key=lambda key: (key[1], key[0])):
            if index in (None, one):
                self.found[group, one].check_finite()

    def take(self, index: int) -> dict[int, LayerStatistics]:
        """The statistics of a layer by group, which are kept here no longer."""
        keys = [key for key in sorted(self.found) if key[1] == index]
        return {key[0]: self.found.pop(key) for key in keys}

    def of_group(self, group: int = 0) -> list[LayerStatistics]:
        """The statistics of one group, by layer."""
        return [self.found[key] for key in sorted(self.found) if key[0] == group]


@contextmanager
def collecting(
    model: Model, only_routers: bool = False, neurons: bool = False
) -> Iterator[Collection]:
    """Collect while it is open: all statistics, or those of the routers alone.

    With `only_routers` a batch ends at the last MoE layer's router. neurons: those of the hidden
    units, too.
    """

    def add(info: LayerInfo, routing: Routing) -> None:
        if collection.counts:
            collection.of(info.index).add(routing)

    def add_routed(layer: MoELayer, *routed: Tensor) -> None:
        if collection.counts:
            collection.of(layer.info.index).add_routed(*routed)

    opened = observe_routers(model, add_routed) if only_routers else observe(model, add, neurons)
    with torch.inference_mode(), opened as observation:
        collection = Collection(moe_layers(model), observation, neurons)
        yield collection


def collect_statistics(
    model: Model,
    batches: Iterable[dict[str, Tensor]],
    only_routers: bool = False,
    neurons: bool = False,
) -> list[LayerStatistics]:
    """The statistics of a model in one pass over `batches` (input_ids, attention_mask [B, L])."""
    numbered = ((0, batch) for batch in batches)
    return collect_by_group(model, numbered, only_routers, neurons).of_group()


def collect_by_group(
    model: Model,
    batches: Iterable[tuple[int, dict[str, Tensor]]],
    only_routers: bool = False,
    neurons: bool = False,
) -> Collection:
    """The same split by the number of the group that stands before each batch.

    NotFinite where a layer's sums are not finite.
    """
    with collecting(model, only_routers, neurons) as collection:
        for group, batch in batches:
            collect_batch(collection, model, batch, group)
        collection.check_finite()
    return collection


def collect_batch(
    collection: Collection, model: Model, batch: dict[str, Tensor], group: int = 0
) -> None:
    """Add one batch, computed by the whole model."""
    with collection.batch(batch["attention_mask"].bool(), group):
        # Only the last position's logits: nobody reads them, and they would dominate.
        model(**batch, use_cache=False, logits_to_keep=1)


def added(parts: Iterable[Sequence[LayerStatistics]]) -> list[LayerStatistics]:
    """The statistics of several passes over parts of the data as those of one over all of it."""
    of_layer: dict[int, list[LayerStatistics]] = {}
    for layer in (layer for part in parts for layer in part if layer["tokens"] > 0):
        of_layer.setdefault(layer.info.index, []).append(layer)
    return [_added(of_layer[index]) for index in sorted(of_layer)]


def _added(parts: Sequence[LayerStatistics]) -> LayerStatistics:
    first = parts[0]
    names = [name for name in first.sums if all(name in part.sums for part in parts)]
    sums = {name: combined(name, [part[name] for part in parts]) for name in names}
    return LayerStatistics(first.info, sums)


def save_statistics(layers: Iterable[LayerStatistics], folder: Path) -> None:
    """One safetensors file a layer, and `layers.json` that names them."""
    infos = []
    for layer in layers:
        sums = {name: value.contiguous() for name, value in layer.sums.items()}
        save_file(sums, folder / f"layer_{layer.info.index:03d}.safetensors")
        infos.append(asdict(layer.info))
    (folder / LAYERS).write_text(json.dumps(infos, indent=1) + "\n")


def load_statistics(folder: Path) -> list[LayerStatistics]:
    """Read what `save` wrote."""
    infos = [LayerInfo(**values) for values in json.loads((folder / LAYERS).read_text())]
    return [
        LayerStatistics(info, load_file(folder / f"layer_{info.index:03d}.safetensors"))
        for info in infos
    ]


def save_groups(groups: Mapping[str, Iterable[LayerStatistics]], folder: Path) -> None:
    """The statistics of each group in groups/<number>/, and `groups.json`, their names in order."""
    for number, layers in enumerate(groups.values()):
        (folder / "groups" / str(number)).mkdir(parents=True, exist_ok=True)
        save_statistics(layers, folder / "groups" / str(number))
    (folder / GROUPS).write_text(json.dumps(list(groups)) + "\n")


def load_groups(folder: Path) -> dict[str, list[LayerStatistics]]:
    """Read what `save_groups` wrote; empty where there are no groups."""
    if not (folder / GROUPS).is_file():
        return {}
    names = json.loads((folder / GROUPS).read_text())
    return {
        name: load_statistics(folder / "groups" / str(number)) for number, name in enumerate(names)
    }


def super_experts(
    layers: Sequence[LayerStatistics], include_last: bool = False
) -> dict[int, tuple[int, ...]]:
    """The few experts of a model whose outputs have extreme components, by layer index.

    Su et al. (2507.23279), as REAP's code (2510.13999) has it: max_activation above the 99.5th
    percentile of all experts of all layers and above a tenth of the largest, in the first three
    quarters of the MoE layers; `include_last` looks at all of them ("outliers" there).
    """
    activations = torch.cat([layer["max_activation"] for layer in layers])
    threshold = max(activations.quantile(0.995), activations.max() / 10)
    searched = len(layers) if include_last else int(0.75 * len(layers))
    extreme = {}
    for place, layer in enumerate(layers):
        above = layer["max_activation"] > threshold
        extreme[layer.info.index] = tuple(above.nonzero().flatten().tolist())
        if place >= searched:
            extreme[layer.info.index] = ()
    return extreme
