"""Evaluate: tasks through lm-eval in this process, and the divergence from the dense model."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from moe_lab import processes
from moe_lab.compute import Compute
from moe_lab.data.embedded import standard_library_fingerprint
from moe_lab.data.tokens import Tokens
from moe_lab.dependencies import code_version
from moe_lab.evaluate.decoding.base import PLAIN, Decoding, decoding_identity
from moe_lab.evaluate.dense_predictions import DensePredictions
from moe_lab.evaluate.held_out import compare_held_out
from moe_lab.evaluate.run_tasks import run_tasks
from moe_lab.evaluate.suite import Suite, others_of
from moe_lab.evaluate.tasks import harness
from moe_lab.integrity import write_whole
from moe_lab.models.activations import Activations
from moe_lab.models.checkpoint import Checkpoint, meta_model
from moe_lab.models.layers import moe_layers
from moe_lab.stages.context import Context
from moe_lab.stages.stage import Stage
from moe_lab.store import Artifact

if TYPE_CHECKING:
    from moe_lab.stages.run import Run

logger = logging.getLogger(__name__)
RESULTS_FILE = "results.json"
ROUTING = "routing.json"
# Of a suite's options: what these name enters by its content, or by what is evaluated.
NAMED = ("tasks", "group_task", "mirror", "held_out", "top_k", "decoding")


@dataclass(frozen=True)
class Evaluation:
    """A variant of a model and the model itself, a suite with its composed options and its text."""

    variant: Checkpoint
    dense: Checkpoint
    suite: Suite
    options: Mapping[str, Any]
    held_out: Tokens | None = None

    def identity(self) -> dict[str, Any]:
        """What the scores depend on."""
        return {
            "checkpoint": self.variant.fingerprint,
            "dense": self.dense.fingerprint,
            "dtype": self.variant.dtype,
            "texts": self.variant.texts_fingerprint if self.suite.tasks else None,
            "held_out": self.held_out.fingerprint if self.held_out else None,
            "code": code_version(evaluate, type(self.suite), self.suite.how),
        } | asked_of(self.suite.tasks, self.suite.mirror, self.options)


def evaluate(context: Context, asked: Evaluation) -> Artifact:
    """A folder with results.json: <task>/<metric>, average, and HeldOut's figures, flat.

    Beside it routing.json, HeldOut's `routed`, where there is held-out text.
    """

    def make(folder: Path) -> None:
        suite, compute = asked.suite, context.compute
        _check_left(suite.how, asked.variant)
        text = asked.held_out
        batches = text and text.batches(compute.batch_size, compute.device, compute.batch_tokens)
        # Before the variant is loaded: a device holds one model at a time.
        dense = _dense_predictions(asked, batches, compute, folder) if batches else None
        model = asked.variant.load(compute.device)
        logger.info("evaluate: %s", ", ".join(suite.tasks) or "held-out text")
        results: dict[str, float] = {}
        if suite.tasks:
            tokenizer = asked.variant.tokenizer()
            sizes = compute.batch_size, compute.batch_tokens
            results |= run_tasks(model, tokenizer, suite, folder, *sizes)
        if text and batches:
            compared = compare_held_out(model, batches, dense, text.positions_by_length())
            results |= compared.figures
            if processes.is_main():
                write_whole(folder / ROUTING, json.dumps(compared.routed) + "\n")
        write_results(folder, results)

    return context.store.get("evaluate", asked.identity(), make, together=True)


def _dense_predictions(
    asked: Evaluation, batches: Sequence[dict[str, Tensor]], compute: Compute, folder: Path
) -> DensePredictions | None:
    """Those of the dense model, which is gone then; None where it is the variant itself."""
    variant, dense = asked.variant, asked.dense
    if variant.path == dense.path and variant.top_k in (None, dense.layers()[0].top_k):
        return None
    limit = int(compute.cache_gib * 2**30)
    kept = Activations(limit, folder, compute.device, compute.device_cache())
    return DensePredictions(dense.load(compute.device), batches, kept)


def _check_left(how: Decoding, variant: Checkpoint) -> None:
    """Refuse what the MoE layers that are left have too few experts for; say where none is left."""
    if how.name == PLAIN:
        return
    layers = [layer.info for layer in moe_layers(meta_model(variant.config))]
    how.check(layers)
    if not layers:
        logger.warning(
            "decoding=%s: the model has no MoE layer any more, so that no token can be routed "
            "otherwise", how.name,
        )  # fmt: skip


def asked_of(
    tasks: Sequence[str], mirror: str | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    """The part of an identity that says what is asked, and of which data.

    options: a suite's composed ones. Where its texts and datasets lie is no part of the result's
    identity; what is in them is.
    """
    others = others_of(tasks)
    embedded = len(others) < len(tasks)
    own = {name: (harness.SST5 / f"{name}.yaml").read_text() for name in harness.HARNESS_NAMES}
    return {
        "tasks": list(tasks),
        "suite": {name: value for name, value in options.items() if name not in NAMED},
        "decoding": decoding_identity(options.get("decoding", PLAIN)) if tasks else None,
        "text": standard_library_fingerprint("test") if embedded else None,
        "datasets": harness.fingerprint(others, mirror) if others and mirror else None,
        "own": {name: own[name] for name in others if name in own},
    }


def write_results(folder: Path, results: Mapping[str, float]) -> None:
    """Put scores where `results_of` reads them: the main process does."""
    if processes.is_main():
        write_whole(folder / RESULTS_FILE, json.dumps(results, indent=1) + "\n")


def results_of(artifact: Artifact) -> dict[str, float]:
    """The scores in the result of an evaluation."""
    results: dict[str, float] = json.loads((artifact.folder / RESULTS_FILE).read_text())
    return results


def tell_scores(report: dict[str, Any], variant: str, results: Mapping[str, float]) -> None:
    """Put a variant's scores into a report; no entropy where experts are repeated in it.

    A repeated expert shares its probability with its twin: more entropy, and the same function.
    """
    repeated = f"{variant.partition('_top_')[0]}/repeated_parameters" in report
    for key, value in results.items():
        if not (repeated and key == "routing/entropy"):
            report[f"{variant}/kl" if key == "kl" else f"{variant}/eval/{key}"] = value


def _inputs(run: Run) -> dict[str, Evaluation]:
    suite = run.parts.eval
    if suite is None:
        return {}
    options, text = run.config["eval"], run.texts.get("held_out")
    return {
        f"evaluate_{name}": Evaluation(variant, run.dense, suite, options, text)
        for name, variant in run.all_variants.items()
    }


def _read(run: Run, name: str, result: Artifact) -> None:
    tell_scores(run.report, name.removeprefix("evaluate_"), results_of(result))


STAGE = Stage(_inputs, evaluate, _read)
