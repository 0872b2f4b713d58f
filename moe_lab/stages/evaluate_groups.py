"""Evaluate the plans of groups: each group's tasks on the dense model with its experts alone."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_lab.dependencies import code_version
from moe_lab.evaluate.run_tasks import run_tasks
from moe_lab.evaluate.suite import Suite
from moe_lab.files import PLAN, PLANS
from moe_lab.models.checkpoint import Checkpoint, meta_model
from moe_lab.models.edits.plan import Plan, restructure_model
from moe_lab.models.layers import num_parameters
from moe_lab.models.narrowing import Left, left_with, neurons_name
from moe_lab.stages.context import Context
from moe_lab.stages.evaluate import asked_of, results_of, tell_scores, write_results
from moe_lab.stages.stage import Stage
from moe_lab.store import Artifact

if TYPE_CHECKING:
    from moe_lab.stages.run import Run

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GroupEvaluation:
    """A model, the plans of its calibration set's groups, and a suite with its composed options."""

    dense: Checkpoint
    plans: Artifact
    suite: Suite
    options: Mapping[str, Any]

    @property
    def groups(self) -> list[str]:
        """The groups' names, in the order of their plans."""
        names: list[str] = Plan.load(self.plans.folder / PLAN).notes["groups"]
        return names

    def identity(self) -> dict[str, Any]:
        """What the scores depend on."""
        tasks = [name for group in self.groups for name in self.suite.tasks_of(group)]
        return {
            "dense": self.dense.fingerprint,
            "texts": self.dense.texts_fingerprint,
            "dtype": self.dense.dtype,
            "plan": self.plans.key,
            "code": code_version(evaluate_groups, type(self.suite), self.suite.how),
        } | asked_of(tasks, self.suite.mirror, self.options)


def evaluate_groups(context: Context, asked: GroupEvaluation) -> Artifact:
    """Results as `evaluate` has them; average is over the groups, and groups how many there are.

    No weight is changed: a group's plan only says which experts its routers choose among, or which
    of their hidden units compute.
    """

    def make(folder: Path) -> None:
        model, tokenizer = asked.dense.load(context.compute.device), asked.dense.tokenizer()
        results: dict[str, float] = {}
        averages = []
        for number, group in enumerate(asked.groups):
            suite = replace(asked.suite, tasks=asked.suite.tasks_of(group))
            logger.info("evaluate: group %s: %s", group, ", ".join(suite.tasks))
            plan = Plan.load(asked.plans.folder / PLANS / f"{number}.json")
            with left_with(model, left_by(plan)):
                sizes = context.compute.batch_size, context.compute.batch_tokens
                scores = run_tasks(model, tokenizer, suite, folder, *sizes)
            averages += [scores.pop("average")] if "average" in scores else []
            results |= scores
        if averages:
            results["average"] = sum(averages) / len(averages)
        write_results(folder, results | {"groups": len(asked.groups)})

    return context.store.get("evaluate", asked.identity(), make, together=True)


def left_by(plan: Plan) -> dict[int, Left]:
    """What a plan with one unit leaves of each layer, by true index: experts, or hidden units."""
    left: dict[int, Left] = {}
    for chain in plan.chains():
        if (kept_EI := plan.tensors.get(neurons_name(chain.index))) is not None:
            left[chain.index] = kept_EI.bool()
        elif chain.experts_kept is not None:
            left[chain.index] = chain.experts_kept
    return left


def sizes_of_groups(plans: Artifact, dense: Checkpoint) -> dict[str, float]:
    """The parameters that a group's experts and all else have, on average over the groups."""
    sizes = []
    for file in sorted((plans.folder / PLANS).glob("*.json")):
        model = meta_model(dense.config)
        restructure_model(model, Plan.load(file).edits)
        sizes.append(num_parameters(model))
    mean, whole = sum(sizes) / len(sizes), num_parameters(meta_model(dense.config))
    return {"compressed/parameters": mean, "compressed/parameter_ratio": mean / whole}


def _inputs(run: Run) -> dict[str, GroupEvaluation]:
    suite = run.parts.eval
    if suite is None or not run.texts["calibration"].groups:
        return {}
    asked = GroupEvaluation(run.dense, run.results["plan"], suite, run.config["eval"])
    return {"evaluate_groups": asked}


def _read(run: Run, name: str, result: Artifact) -> None:
    run.report |= sizes_of_groups(run.results["plan"], run.dense)
    tell_scores(run.report, "compressed", results_of(result))


STAGE = Stage(_inputs, evaluate_groups, _read)
