"""What is refused or announced before any work: what the parts of a run ask of each other."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from moe_lab.compute import Compute
from moe_lab.data.tokens import Tokens
from moe_lab.evaluate.decoding.base import PLAIN
from moe_lab.evaluate.suite import Suite
from moe_lab.finetune.recipe import Recipe
from moe_lab.measure.speed import Measurement
from moe_lab.measure.vllm import ThroughVllm, check_plugin
from moe_lab.methods.base import Method
from moe_lab.methods.metrics.base import names_from_routers
from moe_lab.methods.none import Nothing
from moe_lab.models.architecture import differences
from moe_lab.models.checkpoint import Checkpoint, Original, meta_model
from moe_lab.models.edits.base import Edit
from moe_lab.models.edits.factorize import FactorizeExperts
from moe_lab.models.edits.keep import KeepLayer
from moe_lab.models.edits.narrow import NarrowExperts
from moe_lab.models.edits.plan import Plan
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.models.forms import form_of
from moe_lab.models.matrices import matrices_of
from moe_lab.models.mtp_saving import foresee_mtp
from moe_lab.models.opening import stored_dtype
from moe_lab.models.quantised import result_dtype, stored_in_few_bits
from moe_lab.models.stored import dtype_name
from moe_lab.models.weight_files import size_in_bytes
from moe_lab.quantize.base import Quantizer, check_unquantised
from moe_lab.types import LayerInfo, UserError

logger = logging.getLogger(__name__)


def compare_architecture(checkpoint: Checkpoint, model: Mapping[str, Any]) -> None:
    """Say where a checkpoint is not of the structure that its config group's option states."""
    architecture = model.get("architecture")
    if architecture and (different := differences(checkpoint.config, architecture)):
        logger.warning(
            "%s is not model=%s as published: %s. Is it the checkpoint that was meant? "
            "model.architecture=null compares nothing",
            checkpoint.path, model["name"], ", ".join(different),
        )  # fmt: skip


def in_quick_dtype(
    checkpoint: Checkpoint, layers: Sequence[LayerInfo], compute: Compute
) -> Checkpoint:
    """The checkpoint in the dtype to compute in: where that is left to us, one the device has.

    model.dtype=auto takes that of the files; where the device has no units for it, float32, if the
    model then takes no more than half of the memory. Either is said, and so is a dtype that was
    asked for and will be slow.
    """
    left_to_us = checkpoint.dtype == "auto"
    stored = dtype_name(stored_dtype(checkpoint.config))
    asked = stored if left_to_us else checkpoint.dtype
    if compute.has_units_for(asked):
        return checkpoint
    slow = f"this {'GPU' if compute.device.startswith('cuda') else 'CPU'} has no units for {asked}"
    if not left_to_us:
        logger.warning("%s, and takes several times as long as for float32, or for model.dtype="
                       "auto, which chooses that here", slow)  # fmt: skip
        return checkpoint
    needed, there = 4 * layers[0].model_parameters, compute.memory()
    if needed > there / 2:
        logger.warning(
            "%s, and is slow; in float32 the model would take %.3g GiB of %.3g, more than half: it "
            "is computed in %s as it is stored. model.dtype=float32 takes float32 all the same",
            slow, needed / 2**30, there / 2**30, asked,
        )  # fmt: skip
        return checkpoint
    logger.info(
        "%s: the model, stored in it, is computed in float32; model.dtype=%s keeps it", slow, asked
    )
    return replace(checkpoint, dtype="float32")


def announce_dequantising(checkpoint: Checkpoint, layers: Sequence[LayerInfo]) -> None:
    """Say that a quantised model is dequantised, and how large the result will be."""
    kind = stored_in_few_bits(checkpoint.config)
    if isinstance(checkpoint, Original) or not kind:
        return
    dtype = dtype_name(result_dtype(checkpoint.config))
    sizes = size_in_bytes(checkpoint.path), layers[0].model_bytes
    before, after = (f"{size / 2**30:.3g} GiB" for size in sizes)
    logger.warning(
        "%s is stored in %s (%s) and is dequantised to %s as it is read: it takes %s whole, and "
        "what is written of it is %s, too", checkpoint.path, kind, before, dtype, after, dtype,
    )  # fmt: skip


def check_profile(compute: Compute, method: Method) -> None:
    """Refuse a profile of the routers alone where the method needs more."""
    if compute.profile == "routers" and not method.from_routers:
        raise UserError(
            "compute.profile=routers is enough for method=prune method.unit=experts with metric="
            f"{', '.join(names_from_routers())}, and for method=none; what was asked for "
            "needs the experts' outputs too: compute.profile=all"
        )


def check_recipe(
    checkpoint: Checkpoint, method: Method, recipe: Recipe | None, layers: Sequence[LayerInfo]
) -> None:
    """Refuse a recipe that cannot work with the model, or that the plan leaves nothing to train.

    Known before any work from the shape of the plan's edits, where the method tells it.
    """
    if not recipe:
        return
    recipe.check_model(checkpoint.config, layers)
    if edits := method.example(layers):
        indices = {edit.index for edit in edits}
        others = (info for info in layers if info.index not in indices)
        kept = tuple(KeepLayer(info.index, info.name) for info in others)
        recipe.check(Plan((*edits, *kept)))


def check_decoding(
    checkpoint: Checkpoint, method: Method, suite: Suite | None, layers: Sequence[LayerInfo]
) -> None:
    """Refuse a decoding for which the model, or what will be left of it, has too few experts, and
    one that its routers do not obey."""
    if not suite or suite.how.name == PLAIN:
        return
    suite.how.check(layers)
    with suite.how.opened(meta_model(checkpoint.config)):
        pass
    numbers, example = method.foreseen(layers) or {}, method.example(layers) or ()
    fewer = {edit.index for edit in example if not edit.keeps_rows and edit.index in numbers}
    suite.how.check(
        [
            replace(info, num_experts=numbers[info.index], real_experts=0)
            for info in layers
            if info.index in fewer and numbers[info.index]
        ]
    )


def check_rounding(recipe: Recipe | None, quantizer: Quantizer | None, compute: Compute) -> None:
    """Refuse to tune experts as they will be stored where it is not known how, or not possible."""
    if recipe is None or not recipe.rounds:
        return
    asked = "finetune.quantization_aware=true"
    if quantizer is None or quantizer.reader(0) is None:
        raise UserError(
            f"{asked} computes with experts as they will be stored, each weight at its nearest "
            "level: ask for quantize=rtn, quantize=moqe or quantize=planned"
        )
    if quantizer.what != "experts":
        raise UserError(f"{asked} rounds routed experts alone: quantize.what=experts")
    if compute.sharding == "fsdp":
        raise UserError(f"{asked} needs each layer whole: compute.sharding=none")


def check_steps(recipe: Recipe | None, texts: Mapping[str, Tokens]) -> None:
    """Refuse what a recipe cannot do in as few steps as its text gives."""
    if recipe:
        phases = recipe.phases.items()
        recipe.check_steps(
            sum(phase.steps(len(texts[f"{name}/data"].samples)) for name, phase in phases)
        )


def check_mtp(checkpoint: Checkpoint, method: Method, layers: Sequence[LayerInfo]) -> None:
    """Refuse MTP layers left whole beside others with fewer or narrower experts, if foreseen."""
    if method.mtp != "keep" or isinstance(checkpoint, Original):
        return
    numbers = method.foreseen(layers) or {}
    example = method.example(layers) or ()
    edits: list[Edit] = [edit for edit in example if isinstance(edit, NarrowExperts)]
    edits += [
        PruneExperts(edit.index, edit.name, kept=tuple(range(numbers[edit.index])))
        for edit in example
        if edit.index in numbers and edit not in edits and not edit.keeps_rows
    ]
    foresee_mtp(checkpoint, edits, "keep")


def check_served(
    checkpoint: Checkpoint,
    method: Method,
    how: Measurement | None,
    layers: Sequence[LayerInfo],
) -> None:
    """Refuse what vLLM's environment could not serve, as far as the form is known before."""
    if not isinstance(how, ThroughVllm):
        return
    found = how.check(checkpoint)
    if edits := method.example(layers):
        numbers = method.foreseen(layers) or {}
        foreseen = [
            replace(edit, kept=tuple(range(numbers[edit.index])))
            if isinstance(edit, PruneExperts) and edit.index in numbers
            else edit
            for edit in edits
        ]
        form = form_of(checkpoint.config, foreseen, method.padding, method.convert)
        if not form.stock:
            check_plugin(found, "the result")


def announce_form(checkpoint: Checkpoint, method: Method, layers: Sequence[LayerInfo]) -> None:
    """Say beforehand where the result will not load in stock transformers, or only with padding."""
    if checkpoint.repeats_experts:
        logger.warning(
            "%s has layers filled up with copies of their experts, which statistics, pruning and "
            "more than one expert per token take for experts of their own; made with "
            "finetune.twins=0 it has none", checkpoint.path,
        )  # fmt: skip
    if edits := method.example(layers):
        form = form_of(checkpoint.config, edits, method.padding, method.convert)
        if not method.foresees_form(layers):
            logger.info("%s", method.unforeseen)
        elif not form.plain:
            logger.info("the result will be saved %s", form.reason)


def check_quantizer(
    checkpoint: Checkpoint,
    method: Method,
    recipe: Recipe | None,
    quantizer: Quantizer | None,
    layers: Sequence[LayerInfo],
) -> None:
    """Refuse what a quantizer cannot pack, as far as it is known, and say in which form it will be.

    What a plan makes narrower is looked at again behind it.
    """
    if method.decides_bits and not (quantizer and quantizer.follows_plan):
        raise UserError(
            "ratio.bits counts matrices in so many bits, and nothing stores them so: "
            "quantize=planned does, or leave it out (ratio.bits=null)"
        )
    if quantizer is None or isinstance(checkpoint, Original):
        return
    if isinstance(method, Nothing) and recipe is None:
        check_unquantised(checkpoint)
    if not method.decides_bits:
        quantizer.obeying({})  # what follows a plan's bits is refused where the plan decides none
    edits = method.example(layers) or ()
    narrows = any(isinstance(edit, NarrowExperts) for edit in edits)
    matrices = matrices_of(checkpoint)
    if not matrices.every:  # in few bits: what is made of it has others
        quantizer.check(())
        return
    chosen = quantizer.chosen(matrices)
    factors = {edit.index for edit in edits if isinstance(edit, FactorizeExperts)}
    if all(one.part == "experts" and one.layer in factors for one in chosen):
        raise UserError(
            f"quantize.what={quantizer.what}: method=factorize makes factors of all these, "
            "and factors are not packed: leave some layers as they are (method.layers), or "
            "quantize.what=dense or attention"
        )
    quantizer.check([one for one in chosen if not (narrows and one.part == "experts")])
    if isinstance(method, Nothing):
        quantizer.check_size(chosen)
    known = method.foresees_form(layers)
    if edits and not (
        known and form_of(checkpoint.config, edits, method.padding, method.convert).stock
    ):
        logger.info(
            "quantized, it will be packed in moe_lab's own form, which no other reader knows%s",
            "" if known else ", unless the plan leaves what its family's form holds",
        )
        return
    for told in quantizer.announced(checkpoint, matrices):
        logger.info("%s", told)
