"""A run in the numbers that its cost depends on (`forecast.work.Work`), from what was composed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from moe_lab.compute import Compute
from moe_lab.data.hub import HubDataset
from moe_lab.data.mixture import Mixture
from moe_lab.data.source import Source
from moe_lab.data.tokens import Tokens
from moe_lab.evaluate.suite import Suite, others_of
from moe_lab.evaluate.tasks.tiny.tasks import ITEMS_PER_PERPLEXITY_SAMPLE, MULTIPLE_CHOICE
from moe_lab.evaluate.top_k import other_top_k
from moe_lab.finetune.recipe import Distilling, Recipe, sources
from moe_lab.finetune.tuning import trained
from moe_lab.forecast.stages import states_of
from moe_lab.forecast.work import (
    EvaluatingWork,
    MeasuringWork,
    ProfilingWork,
    QuantizingWork,
    Text,
    TracingWork,
    TuningWork,
    Weights,
    Work,
)
from moe_lab.models.checkpoint import Checkpoint, Original
from moe_lab.models.edits.keep import KeepLayer
from moe_lab.models.edits.plan import Plan
from moe_lab.models.grouped import experts_in_files_dtype
from moe_lab.models.layers import layer_index, moe_layers
from moe_lab.models.matrices import matrices_of
from moe_lab.models.packing import packed_bytes
from moe_lab.models.quantised import stored_in_few_bits
from moe_lab.models.rounding import Scheme
from moe_lab.models.weight_files import weight_files
from moe_lab.stages.foreseen import Foreseen, dense_weights, edited_model, foreseen, search_of
from moe_lab.stages.parts import Parts
from moe_lab.stages.texts import all_sources
from moe_lab.types import LayerInfo

Lengths = Mapping[str, Sequence[int]]  # tokens of each sample, by the use of the text
PER_ITEM = 4  # of an item of a task, each a sequence of its own
TINY_CHOICE, TINY_PASSAGE, TINY_LONGEST = 36, 150, 256  # tokens, with the shipped models' tokenizer
OTHER_ITEMS, OTHER_TOKENS = 1000, 128  # what is assumed of a task of others


@dataclass(frozen=True)
class Prospect:
    """A run before any work: the model, its MoE layers, what is made of it, and what it costs.

    assumed: what the figures take for granted, in words.
    """

    checkpoint: Checkpoint
    layers: Sequence[LayerInfo]
    foreseen: Foreseen
    work: Work
    assumed: tuple[str, ...] = ()


def prospect_of(
    checkpoint: Checkpoint,
    layers: Sequence[LayerInfo],
    parts: Parts,
    compute: Compute,
    memory: float,
    lengths: Lengths,
    assumed: Sequence[str] = (),
    store: Path | None = None,
) -> Prospect:
    """Everything that a forecast starts from; memory: bytes of the device that compute names.

    store: where results go, which files of the checkpoint can be linked into, if it is known.
    """
    dense = dense_weights(checkpoint, layers)
    behind = foreseen(checkpoint, parts.method, layers, dense)
    method = parts.method
    text = Text(tuple(lengths["calibration"]), compute.batch_size, compute.batch_tokens)
    layerwise = compute.profiles_layerwise(dense.bytes, states_of(dense, text), memory)
    cache = int(compute.cache_gib * 2**30)
    routers, ahead = compute.profile == "routers", compute.device.startswith("cuda")
    told = list(assumed)
    if parts.eval and (others := others_of(parts.eval.tasks)):
        told.append(_assumed_of(parts.eval, len(others)))
    if not behind.exact:
        told.append("how much goes of each layer is known with the plan: sizes are about right")
    work = Work(
        dense=dense,
        edited=_linked(behind, checkpoint, store),
        profiling=ProfilingWork(text, layerwise, cache, routers, method.of_neurons, ahead),
        search=search_of(method, layers),
        converts=isinstance(checkpoint, Original),
        diagnosed=_diagnosed(parts, text),
        tuning=_tuning(checkpoint, layers, parts, behind, dense, lengths, compute, memory),
        quantizing=_quantizing(checkpoint, layers, parts, behind, text),
        evaluating=_evaluating(checkpoint, layers, parts, lengths, compute),
        measuring=_measuring(parts),
        tracing=_tracing(parts, lengths),
    )
    return Prospect(checkpoint, layers, behind, work, tuple(told))


def _linked(behind: Foreseen, checkpoint: Checkpoint, store: Path | None) -> Weights | None:
    """What is written of an edited model: files that stay are linked, where one disk has both."""
    if behind.weights is None or store is None:
        return behind.weights
    there = next(one for one in (store, *store.resolve().parents) if one.exists())
    source = weight_files(checkpoint.path)[0].resolve()
    one_disk = there.stat().st_dev == source.stat().st_dev
    return replace(behind.weights, shared=behind.shared if one_disk else 0)


def lengths_of(texts: Mapping[str, Tokens]) -> dict[str, Sequence[int]]:
    """Of text that was read."""
    return {name: [len(sample) for sample in text.samples] for name, text in texts.items()}


def longest_lengths(parts: Parts, positions: int | None) -> dict[str, Sequence[int]]:
    """Of text that is not read: every sample as long as it may be."""
    most = positions or 2**31
    return {
        name: [min(source.max_length, most)] * source.num_samples
        for name, source in all_sources(parts).items()
    }


def is_downloaded(source: Source) -> bool:
    """Whether reading a source may download something."""
    if isinstance(source, Mixture):
        return any(is_downloaded(part["source"]) for part in source.parts.values())
    return isinstance(source, HubDataset)


def _diagnosed(parts: Parts, text: Text) -> Text | None:
    if parts.diagnose is None:
        return None
    return replace(text, lengths=text.lengths[: parts.diagnose.num_samples])


def _tuning(
    checkpoint: Checkpoint,
    layers: Sequence[LayerInfo],
    parts: Parts,
    behind: Foreseen,
    dense: Weights,
    lengths: Lengths,
    compute: Compute,
    memory: float,
) -> TuningWork | None:
    recipe = parts.finetune
    if recipe is None or (recipe.needs_edits and behind.weights is None):
        return None
    training, narrow = _trained(checkpoint, layers, recipe, behind)
    phases = {name: (one, lengths[f"{name}/data"]) for name, one in recipe.phases.items()}
    steps = sum(phase.steps(len(samples)) for phase, samples in phases.values())
    largest = max(phases.values(), key=lambda one: one[0].batch_size * max(one[1]))
    mean = sum(sum(samples) for _, samples in phases.values())
    mean //= sum(len(samples) for _, samples in phases.values())
    size = largest[0].batch_size
    looked = [
        length
        for name, phase in recipe.phases.items()
        if phase.validation is not None
        for length in lengths[f"{name}/validation"]
    ]
    looks = 1 + -(-steps // recipe.validate_every)
    stored = getattr(checkpoint.config, "dtype", None)
    size_of_stored = stored.itemsize if stored is not None else 4
    in_float32 = recipe.dtype == "float32"
    few_bits = stored_in_few_bits(checkpoint.config)
    if not in_float32 or compute.sharding == "fsdp" or few_bits:
        narrow = 0
    return TuningWork(
        steps=steps,
        accumulation=largest[0].gradient_accumulation,
        text=Text((mean,) * (size - 1) + (max(largest[1]),), size),
        validation=Text(tuple(looked * looks), compute.batch_size) if looked else None,
        trainable=sum(training.values()),
        first=_first(training),
        itemsize=4 if in_float32 else size_of_stored,
        narrow_bytes=narrow * max(0, 4 - size_of_stored),
        converted=in_float32 and stored != torch.float32,
        checkpointing=recipe.gradient_checkpointing,
        teacher_bytes=_teacher(recipe, lengths, dense),
        layerwise=compute.goes_layerwise(dense.bytes, memory),
    )


def _trained(
    checkpoint: Checkpoint, layers: Sequence[LayerInfo], recipe: Recipe, behind: Foreseen
) -> tuple[dict[str, int], int]:
    """Parameters by the names of the tensors that train, of a model without weights.

    And how many there are that may stay in the dtype of the files.
    """
    model = edited_model(checkpoint.config, behind.edits)
    indices = {edit.index for edit in behind.edits}
    kept = (KeepLayer(one.index, one.name) for one in layers if one.index not in indices)
    model.requires_grad_(False)
    if trains := getattr(recipe, "trains", None):  # these recipes look at the routers' values, too
        found = trained(model, moe_layers(model), trains)
    else:
        found = recipe.prepare(model, Plan((*behind.edits, *kept))).trainable
    for parameter in found.values():
        parameter.requires_grad_(True)
    narrow = sum(parameter.numel() for parameter in experts_in_files_dtype(model))
    return {name: parameter.numel() for name, parameter in found.items()}, narrow


def _first(training: Mapping[str, int]) -> int:
    """The first decoder layer in which something trains; 0 where something outside does."""
    numbered = [name for name in training if any(part.isdigit() for part in name.split("."))]
    return min(map(layer_index, numbered), default=0) if len(numbered) == len(training) else 0


def _teacher(recipe: Recipe, lengths: Lengths, dense: Weights) -> int:
    """Bytes of the intact model's distributions, where the recipe learns from them."""
    if not isinstance(recipe, Distilling) or not recipe.distils:
        return 0
    vocabulary = dense.shape.vocabulary
    kept = recipe.teacher_top_k
    row = 4 * vocabulary if kept is None or kept >= vocabulary else 8 * kept + 4
    texts = [lengths[name] for name in sources(recipe.phases)]
    return row * sum(sum(text) - len(text) for text in texts)


def _quantizing(
    checkpoint: Checkpoint,
    layers: Sequence[LayerInfo],
    parts: Parts,
    behind: Foreseen,
    text: Text,
) -> QuantizingWork | None:
    """Of what is left of the model as much is packed as of the intact one."""
    quantizer = parts.quantize
    if quantizer is None:
        return None
    chosen = matrices_of(checkpoint).chosen(quantizer.what)
    before = sum(one.stored.num_bytes for one in chosen)
    scheme = quantizer.scheme or Scheme(8)  # the most that it may be
    after = sum(packed_bytes(one.shape, one.dtype, scheme) for one in chosen)
    left = behind.weights.file_bytes / layers[0].model_bytes if behind.weights else 1.0
    return QuantizingWork(left * before, left * after, text if quantizer.needs_text else None)


def _evaluating(
    checkpoint: Checkpoint,
    layers: Sequence[LayerInfo],
    parts: Parts,
    lengths: Lengths,
    compute: Compute,
) -> EvaluatingWork | None:
    suite = parts.eval
    if suite is None:
        return None
    held_out = lengths.get("held_out")
    tasks = _task_lengths(suite)
    final = parts.finetune.final_top_k if parts.finetune else None
    further = other_top_k(suite.top_k, final, checkpoint.config, layers)
    size = compute.batch_size
    return EvaluatingWork(
        Text(tuple(held_out), size) if held_out else None,
        Text(tuple(tasks), size) if tasks else None,
        1 + len(further),
    )


def _task_lengths(suite: Suite) -> list[int]:
    """Tokens of each sequence that the tasks ask for."""
    found: list[int] = []
    for name in suite.tasks:
        if name in others_of(suite.tasks):
            found += [OTHER_TOKENS] * (PER_ITEM * min(suite.limit or OTHER_ITEMS, OTHER_ITEMS))
        elif name in MULTIPLE_CHOICE:
            found += [TINY_CHOICE] * (PER_ITEM * suite.num_items)
        else:
            number = max(1, suite.num_items // ITEMS_PER_PERPLEXITY_SAMPLE)
            found += [TINY_PASSAGE] * (number - 1) + [TINY_LONGEST]
    return found


def _assumed_of(suite: Suite, number: int) -> str:
    items = min(suite.limit or OTHER_ITEMS, OTHER_ITEMS)
    return (
        f"{number} tasks of lm-eval, whose data is not read, are taken for {items} items each of "
        f"{PER_ITEM} sequences of {OTHER_TOKENS} tokens"
    )


def _measuring(parts: Parts) -> MeasuringWork | None:
    how = parts.measure
    if how is None:
        return None
    return MeasuringWork(how.batch_size, how.prompt_length, how.decode_tokens, how.repeats)


def _tracing(parts: Parts, lengths: Lengths) -> TracingWork | None:
    how = parts.trace
    if how is None:
        return None
    return TracingWork(Text(tuple(lengths["prompts"]), how.batch_size), how.new_tokens)
