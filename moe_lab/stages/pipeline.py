"""One experiment: profile -> plan -> compress -> finetune -> evaluate -> measure -> report.

Reads top to bottom. Every stage is remembered in the store by what it depends on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moe_lab.evaluate.top_k import other_top_k, with_top_k
from moe_lab.finetune.recipe import Distilling
from moe_lab.models import checkpoint
from moe_lab.stages.compress import compress
from moe_lab.stages.convert import convert
from moe_lab.stages.evaluate import evaluate, evaluate_groups, results_of
from moe_lab.stages.finetune import finetune
from moe_lab.stages.measure import figures_of, measure_stage
from moe_lab.stages.outputs import RunReport, checkpoint_of, copy_plan, write_usage
from moe_lab.stages.parts import Parts
from moe_lab.stages.plan import announce_form, check_recipe, plan
from moe_lab.stages.profile import check_profile, profile
from moe_lab.stages.teach import check_teacher, teach
from moe_lab.stages.texts import tokenize
from moe_lab.store import Store, check_writable

Log = Callable[[dict[str, Any]], None]


def pipeline(
    config: Mapping[str, Any],
    parts: Parts,
    figures: dict[str, Any],
    folder: Path,
    log: Log | None = None,
) -> None:
    """Run all stages, filling in the report's `figures` as results come.

    config: the composed options as plain data; parts: what they name; folder: the run's; log: takes
    the rows of a fine-tuning's curve while it trains. UserError for a user's mistake.
    """
    method, recipe, suite = parts.method, parts.finetune, parts.eval

    # Whatever can be refused is refused before anything expensive.
    compute = parts.compute.start()
    asked = config["model"]
    dense = checkpoint.resolve(asked["path"], asked["revision"], asked["dtype"])
    check_writable(Path(config["store"]), 4 * checkpoint.size_in_bytes(dense.path))
    layers = dense.layers()
    method.check(layers)
    check_profile(compute, method)
    if parts.diagnose:
        parts.diagnose.check(compute.profile, layers)
    check_recipe(dense, method, recipe, layers)
    announce_form(dense, method, layers)
    named_top_k = suite.top_k if suite else None
    final_top_k = recipe.final_top_k if recipe else None
    further_top_k = other_top_k(named_top_k, final_top_k, dense.config, layers)
    texts = tokenize(parts, dense.tokenizer())
    figures |= {
        "fingerprint/model": dense.fingerprint,
        "fingerprint/data": texts["calibration"].fingerprint,
    }

    store, report = Store(Path(config["store"])), RunReport(figures, folder)
    if isinstance(recipe, Distilling) and recipe.distils:
        check_teacher(store, dense, recipe, texts)
    if isinstance(dense, checkpoint.Original):
        dense = checkpoint_of(report.add_stage("convert", convert(store, dense)), dense)
    profiled = report.add_stage("profile", profile(store, dense, texts["calibration"], compute))
    write_usage(profiled, folder)
    if parts.diagnose:
        from moe_lab.stages.diagnose import copy_diagnosis, diagnose  # tables: others do not pay

        diagnosed = diagnose(store, dense, profiled, texts["calibration"], parts.diagnose, compute)
        figures |= copy_diagnosis(report.add_stage("diagnose", diagnosed), folder)
    planned = report.add_stage(
        "plan",
        plan(store, dense, profiled, texts["calibration"], method, config["method"], compute),
    )
    variants = {"dense": dense}
    edited = copy_plan(planned, folder, figures)
    if edited:
        compressed = report.add_stage("compress", compress(store, dense, planned, compute))
        variants["compressed"] = checkpoint_of(compressed, dense)
    if recipe and (edited or not recipe.needs_edits):
        taught = None
        if isinstance(recipe, Distilling) and recipe.distils:
            taught = report.add_stage("teacher", teach(store, dense, recipe, texts, compute))
        tuned = finetune(
            store, variants.get("compressed", dense), planned, recipe, config["finetune"], texts,
            config["seed"], compute, taught, log,
        )  # fmt: skip
        variants["finetuned"] = checkpoint_of(report.add_stage("finetune", tuned), dense)
    report.add_checkpoints(variants)
    variants = with_top_k(variants, further_top_k, named_top_k)
    if suite:
        for name, variant in variants.items():
            evaluated = evaluate(
                store, variant, dense, suite, config["eval"], texts.get("held_out"), compute
            )
            report.add_stage(f"evaluate_{name}", evaluated)
            report.add_evaluation(name, results_of(evaluated))
    if suite and texts["calibration"].groups:
        evaluated = evaluate_groups(store, dense, planned, suite, config["eval"], compute)
        report.add_groups(planned, dense)
        report.add_evaluation(
            "compressed", results_of(report.add_stage("evaluate_groups", evaluated))
        )
    if parts.measure:
        measured = measure_stage(store, variants, parts.measure, compute)
        report.add_stage("measure", measured)
        figures |= figures_of(measured)
