"""One experiment: profile, plan, compress, finetune, quantize, evaluate, measure, report.

A new stage is a file beside this one and a line of `STAGES`.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_lab import dependencies, processes, stopping
from moe_lab.compute import Compute
from moe_lab.data.kept_text import keep_in
from moe_lab.evaluate.top_k import other_top_k
from moe_lab.forecast.costs import measured_costs
from moe_lab.forecast.fitting import disk_shortage
from moe_lab.forecast.stages import needs
from moe_lab.lookup import named
from moe_lab.models import checkpoint
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.damage import explained
from moe_lab.models.file_sums import remember_in
from moe_lab.models.head import check_head, sized_with_head
from moe_lab.models.layerwise import computing_dtype
from moe_lab.models.opening import num_positions, text_config
from moe_lab.models.stored import dtype_name
from moe_lab.models.weight_files import size_in_bytes
from moe_lab.stages import forecasting, teach
from moe_lab.stages.checks import (
    announce_dequantising,
    announce_form,
    check_decoding,
    check_mtp,
    check_profile,
    check_quantizer,
    check_recipe,
    check_rounding,
    check_served,
    check_steps,
    compare_architecture,
    in_quick_dtype,
)
from moe_lab.stages.context import Context
from moe_lab.stages.looking import Looking, NotThere
from moe_lab.stages.parts import Parts
from moe_lab.stages.run import Run
from moe_lab.stages.stage import Stage
from moe_lab.stages.texts import tokenize
from moe_lab.store import Store, check_undamaged, check_writable
from moe_lab.types import LayerInfo, NotFinite, UserError

# In this order: files beside this one, or modules elsewhere, with a `STAGE` each.
STAGES = (
    "convert",  # a family that transformers does not read: to one that it reads
    "profile",  # text through the model: sums for each MoE layer
    "diagnose",  # what its experts do
    "plan",  # the method decides what happens to each layer
    "compress",  # that is done to the weights
    "teach",  # what the intact model predicts, for a recipe that learns from it
    "finetune",  # what is left learns
    "quantize",  # its matrices in few bits
    "evaluate",  # each variant on tasks and held-out text
    "evaluate_groups",  # each group of the calibration set with its own experts
    "trace",  # which experts each token is sent to, while each variant generates
    "measure",  # size, memory and speed of all variants, side by side
    "measure_vllm",  # what vLLM serves of each in a second
)
TRAINED_BYTES = 24  # of a parameter that trains, on disk: two states of a training, of 12 each


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
    """Refuse whatever can be refused before anything expensive, and read the text.

    What that takes is told as seconds/text, and all else as part of seconds/start.
    """
    started = time.perf_counter()
    compute, asked = parts.compute.start(), config["model"]
    ignored = asked.get("ignore_tensors") or ()
    dense = checkpoint.resolve(asked["path"], asked["revision"], asked["dtype"], ignored)
    check_undamaged(dense.path)
    store = Store(Path(config["store"]))
    check_writable(store.root, 0)
    remember_in(store.root)
    keep_in(store.root)
    dependencies.remember_modules_in(store.root)
    layers = dense.layers()
    dense = in_quick_dtype(dense, layers, compute)
    further = check_parts(config, parts, compute, dense, layers)
    size = text_config(dense.config).vocab_size
    tokenizer, reading = dense.tokenizer(), time.perf_counter()
    texts = tokenize(parts, tokenizer, num_positions(dense.config), size)
    seconds = time.perf_counter() - reading
    figures.setdefault("seconds/start", 0.0)  # a job's time before it came here
    figures["seconds/text"] = round(seconds, 3)
    figures["hardware"] = compute.hardware()
    figures["dtype"] = dtype_name(computing_dtype(dense))
    check_steps(parts.finetune, texts)
    context = Context(store, compute, log)
    run = Run(config, parts, context, folder, figures, texts, further)
    check_disk(run, dense, layers)
    with processes.main_first():
        figures["fingerprint/model"] = dense.fingerprint
    figures["fingerprint/data"] = texts["calibration"].fingerprint
    run.add_variant("dense", dense)
    if teaching := teach.teaching_of(run):
        teach.check_teacher(store, teaching)
    before = time.perf_counter() - started - seconds
    figures["seconds/start"] = round(figures["seconds/start"] + before, 3)
    return run


def check_parts(
    config: Mapping[str, Any],
    parts: Parts,
    compute: Compute,
    dense: Checkpoint,
    layers: Sequence[LayerInfo],
) -> list[int]:
    """Refuse, or announce, what the parts of a run ask of each other and of the model.

    Gives the further numbers of experts per token at which all variants are evaluated.
    """
    method = parts.method
    compare_architecture(dense, config["model"])
    announce_dequantising(dense, layers)
    check_head(dense.config, method.lm_head)
    method.check(sized_with_head(dense, layers, method.lm_head))
    check_profile(compute, method)
    if parts.diagnose:
        parts.diagnose.check(compute.profile, layers)
    check_recipe(dense, method, parts.finetune, layers)
    check_quantizer(dense, method, parts.finetune, parts.quantize, layers)
    check_rounding(parts.finetune, parts.quantize, compute)
    check_mtp(dense, method, layers)
    check_served(dense, method, parts.measure, layers)
    check_decoding(dense, method, parts.eval, layers)
    announce_form(dense, method, layers)
    told = parts.eval.top_k if parts.eval else None
    final = parts.finetune.final_top_k if parts.finetune else None
    return other_top_k(told, final, dense.config, layers)


def check_disk(run: Run, dense: Checkpoint, layers: Sequence[LayerInfo]) -> None:
    """Refuse a run whose results the store's disk has no room for, as far as it has to make them.

    A UserError tells how much each stage needs. Nothing is foreseen where there is room for the
    most that any run takes.
    """
    root = run.context.store.root
    trained = TRAINED_BYTES * layers[0].model_parameters if run.parts.finetune else 0
    largest = max(layers[0].model_bytes, size_in_bytes(dense.path))
    if 4 * largest + trained <= shutil.disk_usage(root).free:
        return
    compute, lengths = run.context.compute, forecasting.lengths_of(run.texts)
    asked = forecasting.prospect_of(
        dense, layers, run.parts, compute, compute.memory(), lengths, store=root
    )
    expected = list(needs(asked.work, measured_costs()))
    if told := disk_shortage(expected, shutil.disk_usage(root).free):
        known = cached_results(run, dense)
        left = [need for need in expected if not known.get(need.stage)]
        told = disk_shortage(left, shutil.disk_usage(root).free)
    if told:
        raise UserError(f"{told} under {root}. Free some space, or choose another disk: "
                        "store=<folder>")  # fmt: skip


def cached_results(run: Run, dense: Checkpoint) -> dict[str, bool]:
    """Which results of a run the store has, as far as their keys are known before it makes any.

    Each stage is asked as in a run, with a store that makes nothing; behind one that is not there
    only the dense model's evaluation is known.
    """
    found: dict[str, bool] = {}
    with tempfile.TemporaryDirectory() as folder:
        context = replace(run.context, store=Looking(run.context.store.root))
        looking = replace(run, context=context, folder=Path(folder), report=dict(run.report),
                          variants={}, results={})  # fmt: skip
        looking.add_variant("dense", dense)
        for name in STAGES:
            if all(found.values()) or name == "evaluate":
                _look(stage_named(name), looking, found)
    return found


def _look(stage: Stage[Any], looking: Run, found: dict[str, bool]) -> None:
    """Note of each result of a stage whether it is there, and read it where it is."""
    for name, inputs in stage.inputs(looking).items():
        try:
            result = stage.make(looking.context, inputs)
        except NotThere:
            found[name] = False
            continue
        found[name] = True
        looking.add_result(name, result)
        stage.read(looking, name, result)
