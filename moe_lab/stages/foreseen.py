"""What is known of a plan before any work: its edits, what they leave, what finding it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe_lab.forecast.shape import ModelShape, shape_of
from moe_lab.forecast.work import Search, Weights
from moe_lab.methods.base import Method
from moe_lab.methods.condense.base import chooses_units
from moe_lab.methods.condense.method import Condense
from moe_lab.methods.dropping import Dropping
from moe_lab.methods.none import Nothing
from moe_lab.methods.ratios.budget import Budget
from moe_lab.methods.skip import Skip
from moe_lab.models.checkpoint import Checkpoint, Model, meta_model
from moe_lab.models.edits.base import Edit
from moe_lab.models.edits.drop_block import DropBlock
from moe_lab.models.edits.keep import KeepLayer
from moe_lab.models.edits.merge import MergeExperts
from moe_lab.models.edits.plan import restructure_model
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.models.forms import Form, form_of
from moe_lab.models.layers import decoders_path
from moe_lab.models.layerwise import computing_dtype
from moe_lab.models.opening import stored_dtype
from moe_lab.models.weight_files import size_in_bytes, weight_files
from moe_lab.types import LayerInfo

SEARCHING = ("sensitivity", "evolutionary")  # ratios that try what their numbers cost


@dataclass(frozen=True)
class Foreseen:
    """What a plan leaves; None: it changes nothing.

    exact: whether the size is that of the plan, and not the most that it may be. edits: of the
    plan's kind and numbers, of example experts and layers. shared: bytes of the source's files that
    are surely the result's, too, and take no room where they can be linked.
    """

    weights: Weights | None
    form: Form | None
    exact: bool
    edits: tuple[Edit, ...] = ()
    shared: int = 0


def dense_weights(checkpoint: Checkpoint, layers: Sequence[LayerInfo]) -> Weights:
    """The intact model's."""
    path = decoders_path(layers[0].name)
    shape = shape_of(meta_model(checkpoint.config), path)
    dtype = computing_dtype(checkpoint)
    converted = dtype != stored_dtype(checkpoint.config)
    return Weights(shape, dtype.itemsize, size_in_bytes(checkpoint.path), converted)


def foreseen(
    checkpoint: Checkpoint, method: Method, layers: Sequence[LayerInfo], dense: Weights
) -> Foreseen:
    """What the plan of a method leaves of a model, as far as that is known before any work."""
    if isinstance(method, Nothing):
        return Foreseen(None, None, exact=True)
    edits, exact = _edits(method, layers)
    stored = layers[0].model_bytes / layers[0].model_parameters
    if edits is None:
        size = round(dense.shape.parameters * stored)
        return Foreseen(replace(dense, file_bytes=size), None, exact=False)
    form = form_of(checkpoint.config, edits, method.padding, method.convert)
    exact = exact and method.foresees_form(layers)
    shape = _shape_behind(checkpoint.config, edits, form, decoders_path(layers[0].name))
    size = round(shape.parameters * stored)
    shared = _shared(checkpoint, _changed(method, edits, layers), edits, form, layers)
    return Foreseen(replace(dense, shape=shape, file_bytes=size), form, exact, edits, shared)


def _changed(
    method: Method, edits: Sequence[Edit], layers: Sequence[LayerInfo]
) -> list[int | None]:
    """The layers that change, by index; None for each that is known only with the plan."""
    named = getattr(method, "layers", None)
    if isinstance(named, Sequence) and not isinstance(named, str):
        return list(named)
    experts = {info.index: info.num_experts for info in layers}
    changed = {
        edit.index
        for edit in edits
        if not isinstance(edit, KeepLayer) and len(getattr(edit, "kept", ())) < experts[edit.index]
    }
    return list(changed) if len(changed) == len(layers) else [None] * len(changed)


def _shared(
    checkpoint: Checkpoint,
    changed: Sequence[int | None],
    edits: Sequence[Edit],
    form: Form,
    layers: Sequence[LayerInfo],
) -> int:
    """Bytes of the source's files in which nothing changes, at least.

    changed: layers; for each that is not known yet the one is taken whose files are the most.
    """
    files = weight_files(checkpoint.path)
    other = form.config.model_type != checkpoint.config.model_type
    if len(files) < 2 or other or any(isinstance(edit, DropBlock) for edit in edits):
        return 0
    held = checkpoint.held_by(meta_model(checkpoint.config))
    of_layer: dict[int, set[Path]] = {}
    for info in layers:  # attention and norms beside the block stay
        inside = (some for name, some in held.by_name.items() if name.startswith(f"{info.name}."))
        of_layer[info.index] = {file for some in inside for one in some for file in one.files()}
    sizes = {file: file.stat().st_size for file in files}
    for parts in held.others.values():
        for file in {file for one in parts for file in one.files()}:
            sizes.pop(file, None)
    for index in changed:
        if index is None:
            index = max(of_layer, key=lambda at: sum(sizes.get(file, 0) for file in of_layer[at]))
        for file in of_layer.pop(index):
            sizes.pop(file, None)
    return sum(sizes.values())


def edited_model(config: Any, edits: Sequence[Edit]) -> Model:
    """The model that edits leave, without weights."""
    model = meta_model(config)
    restructure_model(model, edits)
    return model


def _shape_behind(config: Any, edits: Sequence[Edit], form: Form, path: str) -> ModelShape:
    model = meta_model(form.config) if form.stock else edited_model(config, edits)
    return shape_of(model, path)


def _edits(method: Method, layers: Sequence[LayerInfo]) -> tuple[tuple[Edit, ...] | None, bool]:
    """Edits with as many experts as the plan will leave, and whether these numbers are its own."""
    edits = method.example(layers)
    if edits is None:
        return None, False
    numbers = method.foreseen(layers)
    exact = numbers is not None or not any(
        isinstance(edit, (PruneExperts, MergeExperts)) for edit in edits
    )
    if numbers is None:
        numbers = _on_average(method, layers)
    of_index = {info.index: info for info in layers}
    return tuple(_sized(edit, of_index[edit.index], numbers) for edit in edits), exact


def _on_average(method: Method, layers: Sequence[LayerInfo]) -> Mapping[int, int]:
    """As many of each layer as a budget leaves together, evenly; empty where it says no number."""
    budget = getattr(method, "ratio", None)
    if not isinstance(budget, Budget) or getattr(method, "of_neurons", False):
        return {}
    share = budget.kept(layers) / sum(info.num_experts for info in layers)
    return {
        info.index: max(info.groups, round(info.num_experts * share / info.groups) * info.groups)
        for info in layers
    }


def _sized(edit: Edit, info: LayerInfo, numbers: Mapping[int, int]) -> Edit:
    """The edit with the first experts of each group of the router, so many in all."""
    if info.index not in numbers or not isinstance(edit, (PruneExperts, MergeExperts)):
        return edit
    size, each = info.num_experts // info.groups, numbers[info.index] // info.groups
    kept = tuple(group * size + place for group in range(info.groups) for place in range(each))
    if isinstance(edit, PruneExperts):
        return replace(edit, kept=kept)
    gone = tuple(sorted(set(range(info.num_experts)) - set(kept)))
    groups = ((kept[0], *gone), *((expert,) for expert in kept[1:]))
    return replace(edit, kept=kept, groups=groups)


def search_of(method: Method, layers: Sequence[LayerInfo]) -> Search:
    """What finding the plan asks of the model."""
    if isinstance(method, Condense):
        return _condensing(method, layers)
    if isinstance(method, (Dropping, Nothing)):
        return Search()
    if isinstance(method, Skip):
        return Search(passes=method.passes(layers))
    parts = (
        method,
        *(getattr(method, name, None) for name in ("metric", "ratio", "grouping", "form")),
    )
    asks = any(getattr(one, name, False) is True
               for one in parts for name in ("needs_model", "propagate"))  # fmt: skip
    asks = asks or type(getattr(method, "ratio", None)).__module__.endswith(SEARCHING)
    refits = getattr(method, "refit", None) not in (None, False, "none")
    return Search(passes=1.0, known=False) if asks or refits else Search()


def _condensing(method: Condense, layers: Sequence[LayerInfo]) -> Search:
    """Of a search for experts in each layer, and of one for layers."""
    searched = isinstance(method.layers, str)
    chosen = list(layers) if searched else [one for one in layers if one.index in method.layers]
    greedy = isinstance(method.experts, str) and method.experts.startswith("greedy_")
    number = method.num_routed if isinstance(method.experts, str) else 0
    candidates = sum(
        sum(one.num_experts - place for place in range(number)) for one in chosen
    ) if greedy else 0  # fmt: skip
    passes = 2.0 if greedy else 0.0
    if searched and str(method.layers).startswith("greedy_"):
        passes += _layer_passes(method.num_layers * method.beam, layers)
    known = method.refit == "none" and not chooses_units(method.experts)
    return Search(passes if known else max(1.0, passes), candidates, known, greedy)


def _layer_passes(number: int, layers: Sequence[LayerInfo]) -> float:
    """Passes through the model of a greedy search for `number` layers.

    Each candidate is computed from its layer on, and one that was chosen is none any more.
    """
    total = layers[0].num_decoders
    behind = sorted((total - info.index) / total for info in layers)
    return sum(sum(behind[: len(behind) - step]) for step in range(min(number, len(behind)))) + 1
