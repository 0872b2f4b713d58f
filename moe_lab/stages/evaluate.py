"""Evaluate: tasks through lm-eval in this process, and the divergence from the dense model."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_lab.compute import Compute
from moe_lab.data.embedded import standard_library_fingerprint
from moe_lab.data.tokens import Tokens
from moe_lab.evaluate.held_out import compare_held_out
from moe_lab.evaluate.run_tasks import run_tasks
from moe_lab.evaluate.suite import Suite, others_of
from moe_lab.evaluate.tasks import harness
from moe_lab.evaluate.tasks.tiny import items
from moe_lab.evaluate.tasks.tiny import tasks as tiny_tasks
from moe_lab.files import PLAN, PLANS
from moe_lab.models import layers, observing, remapped, routers
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.edits.plan import Plan
from moe_lab.models.routers import restricted
from moe_lab.profile import collect
from moe_lab.store import Artifact, Store, code_version, write_whole

logger = logging.getLogger(__name__)
RESULTS_FILE = "results.json"
ROUTING = "routing.json"
# Of a suite's options: what these name enters by its content, or by what is evaluated.
NAMED = ("tasks", "group_task", "mirror", "held_out", "top_k")


def evaluate(
    store: Store,
    variant: Checkpoint,
    dense: Checkpoint,
    suite: Suite,
    options: dict[str, Any],
    held_out: Tokens | None,
    compute: Compute,
) -> Artifact:
    """A folder with results.json: <task>/<metric>, average, and HeldOut's figures, flat.

    Beside it routing.json, HeldOut's `routed`, where there is held-out text.

    options: the suite's composed config. Where its texts and datasets lie is no part of the
    result's identity; what is in them is.
    """

    def make(folder: Path) -> None:
        model = variant.load(compute.device)
        logger.info("evaluate: %s", ", ".join(suite.tasks) or "held-out text")
        results: dict[str, float] = {}
        if suite.tasks:
            results |= run_tasks(model, variant.tokenizer(), suite, folder, compute.batch_size)
        if held_out is not None:
            same = variant.path == dense.path  # perhaps at another number of experts per token
            reference = model if same else dense.load(compute.device)
            top_k = dense.layers()[0].top_k if variant.top_k and same else None
            batches = held_out.batches(compute.batch_size, compute.device)
            compared = compare_held_out(reference, model, batches, top_k)
            results |= compared.figures
            write_whole(folder / ROUTING, json.dumps(compared.routed) + "\n")
        write_whole(folder / RESULTS_FILE, json.dumps(results, indent=1) + "\n")

    identity = {
        "checkpoint": variant.fingerprint,
        "dense": dense.fingerprint,
        "dtype": variant.dtype,
        "held_out": held_out.fingerprint if held_out else None,
        "code": code_version(*_code(), compare_held_out, collect, observing),
    }
    return store.get("evaluate", identity | _asked(suite.tasks, suite.mirror, options), make)


def evaluate_groups(
    store: Store,
    dense: Checkpoint,
    planned: Artifact,
    suite: Suite,
    options: dict[str, Any],
    compute: Compute,
) -> Artifact:
    """The same for the plans of groups: each group's tasks on the dense model with its experts.

    Results as `evaluate` has them; average is over the groups, and groups how many there are. No
    weight is changed: a group's plan only says which experts its routers choose among.
    """
    groups = Plan.load(planned.folder / PLAN).notes["groups"]

    def make(folder: Path) -> None:
        model, tokenizer = dense.load(compute.device), dense.tokenizer()
        results: dict[str, float] = {}
        averages = []
        for number, group in enumerate(groups):
            tasks = suite.tasks_of(group)
            logger.info("evaluate: group %s: %s", group, ", ".join(tasks))
            plan = Plan.load(planned.folder / PLANS / f"{number}.json")
            chains = plan.chains()
            kept = {one.index: some for one in chains if (some := one.experts_kept) is not None}
            with restricted(model, kept):
                of_group = run_tasks(
                    model, tokenizer, replace(suite, tasks=tasks), folder, compute.batch_size
                )
            averages += [of_group.pop("average")] if "average" in of_group else []
            results |= of_group
        if averages:
            results["average"] = sum(averages) / len(averages)
        results["groups"] = len(groups)
        write_whole(folder / RESULTS_FILE, json.dumps(results, indent=1) + "\n")

    tasks = [name for group in groups for name in suite.tasks_of(group)]
    identity = {
        "dense": dense.fingerprint,
        "dtype": dense.dtype,
        "plan": planned.key,
        "code": code_version(*_code()),
    }
    return store.get("evaluate", identity | _asked(tasks, suite.mirror, options), make)


def _code() -> list[object]:
    return [evaluate, run_tasks, Suite, layers, routers, remapped, tiny_tasks, items, harness]


def _asked(tasks: Sequence[str], mirror: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """The part of an identity that says what is asked, and of which data."""
    others = others_of(tasks)
    embedded = len(others) < len(tasks)
    own = {name: (harness.SST5 / f"{name}.yaml").read_text() for name in harness.HARNESS_NAMES}
    return {
        "tasks": list(tasks),
        "suite": {name: value for name, value in options.items() if name not in NAMED},
        "text": standard_library_fingerprint("test") if embedded else None,
        "datasets": harness.fingerprint(others, mirror) if others and mirror else None,
        "own": {name: own[name] for name in others if name in own},
    }


def results_of(artifact: Artifact) -> dict[str, float]:
    """What `evaluate` found."""
    results: dict[str, float] = json.loads((artifact.folder / RESULTS_FILE).read_text())
    return results
