"""One experiment: profile -> plan -> compress -> finetune -> evaluate -> measure -> report.

A new stage is a file beside this one and a line of `STAGES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moe_lab import stopping
from moe_lab.evaluate.top_k import other_top_k
from moe_lab.lookup import named
from moe_lab.models import checkpoint
from moe_lab.models.damage import explained
from moe_lab.models.head import check_head, sized_with_head
from moe_lab.models.opening import num_positions, text_config
from moe_lab.models.weight_files import size_in_bytes
from moe_lab.stages import teach
from moe_lab.stages.checks import (
    announce_dequantising,
    announce_form,
    check_mtp,
    check_profile,
    check_recipe,
    check_served,
    check_steps,
    compare_architecture,
)
from moe_lab.stages.context import Context
from moe_lab.stages.parts import Parts
from moe_lab.stages.run import Run
from moe_lab.stages.stage import Stage
from moe_lab.stages.texts import tokenize
from moe_lab.store import Store, check_undamaged, check_writable
from moe_lab.types import NotFinite, UserError

# In this order: files beside this one, or modules elsewhere, with a `STAGE` each.
STAGES = (
    "convert",  # a family that transformers does not read: to one that it reads
    "profile",  # text through the model: sums for each MoE layer
    "diagnose",  # what its experts do
    "plan",  # the method decides what happens to each layer
    "compress",  # that is done to the weights
    "teach",  # what the intact model predicts, for a recipe that learns from it
    "finetune",  # what is left learns
    "evaluate",  # each variant on tasks and held-out text
    "evaluate_groups",  # each group of the calibration set with its own experts
    "measure",  # size, memory and speed of all variants, side by side
    "measure_vllm",  # what vLLM serves of each in a second
)


def pipeline(
    config: Mapping[str, Any],
    parts: Parts,
    figures: dict[str, Any],
    folder: Path,
    log: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Run all stages, filling in the report's `figures` as results come.

    config: the composed options as plain data; parts: what they name; folder: the run's; log: takes
    the rows of a fine-tuning's curve while it trains. UserError for a user's mistake.
    """
    stages = [stage_named(name) for name in STAGES]
    run = prepare(config, parts, figures, folder, log)
    try:
        for stage in stages:
            stopping.check()
            stage.run(run)
    except NotFinite as error:  # the stage says where; the weights may say why
        raise UserError(f"{error}. {explained(run.variants, error.layer)}") from error


def stage_named(name: str) -> Stage[Any]:
    """The stage of a line of STAGES."""
    stage: Stage[Any] = named("the stage", name, str(__package__), "STAGE")
    return stage


def prepare(
    config: Mapping[str, Any],
    parts: Parts,
    figures: dict[str, Any],
    folder: Path,
    log: Callable[[dict[str, Any]], None] | None = None,
) -> Run:
    """Refuse whatever can be refused before anything expensive, and read the text."""
    compute, method, asked = parts.compute.start(), parts.method, config["model"]
    ignored = asked.get("ignore_tensors") or ()
    dense = checkpoint.resolve(asked["path"], asked["revision"], asked["dtype"], ignored)
    check_undamaged(dense.path)
    compare_architecture(dense, asked)
    store = Store(Path(config["store"]))
    check_writable(store.root, 4 * size_in_bytes(dense.path))
    layers = dense.layers()
    announce_dequantising(dense, layers)
    check_head(dense.config, method.lm_head)
    method.check(sized_with_head(dense, layers, method.lm_head))
    check_profile(compute, method)
    if parts.diagnose:
        parts.diagnose.check(compute.profile, layers)
    check_recipe(dense, method, parts.finetune, layers)
    check_mtp(dense, method, layers)
    check_served(dense, method, parts.measure, layers)
    announce_form(dense, method, layers)
    told = parts.eval.top_k if parts.eval else None
    final = parts.finetune.final_top_k if parts.finetune else None
    top_k = other_top_k(told, final, dense.config, layers)
    size = text_config(dense.config).vocab_size
    texts = tokenize(parts, dense.tokenizer(), num_positions(dense.config), size)
    figures["hardware"] = compute.hardware()
    check_steps(parts.finetune, texts)
    figures["fingerprint/model"] = dense.fingerprint
    figures["fingerprint/data"] = texts["calibration"].fingerprint
    run = Run(config, parts, Context(store, compute, log), folder, figures, texts, top_k)
    run.add_variant("dense", dense)
    if teaching := teach.teaching_of(run):
        teach.check_teacher(store, teaching)
    return run
