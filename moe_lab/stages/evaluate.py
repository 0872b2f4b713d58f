"""Evaluate: tasks through lm-eval in this process, and the divergence from the dense model."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from moe_lab import moe, observing, routing, stand_ins, statistics
from moe_lab.checkpoint import Checkpoint
from moe_lab.compute import Compute
from moe_lab.data import standard_library_fingerprint
from moe_lab.held_out import compare
from moe_lab.routing import restricted
from moe_lab.store import Artifact, Store, code_version, write_whole
from moe_lab.tasks import harness, tiny
from moe_lab.tasks.tiny import items
from moe_lab.tokens import Tokens
from moe_lab.types import Plan, UserError

logger = logging.getLogger(__name__)
RESULTS = "results.json"
ROUTING = "routing.json"
# Of a suite's options: what these name enters by its content, or by what is evaluated.
NAMED = ("tasks", "group_task", "mirror", "held_out", "top_k")


@dataclass(frozen=True)
class Suite:
    """What is evaluated.

    tasks: names that lm-eval knows, or of our own (moe_lab/tasks); num_items: per embedded task
    (tiny); limit: of items per other task; num_fewshot: examples before each item (None is the
    task's own number); metrics: which accuracy of a task enters the average (default: acc);
    mirror: a folder with copies of the hub's datasets as <owner>/<name>, from which alone they are
    then read; top_k: numbers of experts per token at which every variant is evaluated beside its
    own (None: that which the recipe ends with); group_task: which task, or tasks, a group of the
    calibration set is evaluated on, its name in the place of {group}; held_out: a text source for
    the divergence from the dense model, None for none.
    """

    tasks: Sequence[str] = ()
    num_items: int = 200
    limit: int | None = None
    num_fewshot: int | None = None
    metrics: Mapping[str, str] | None = None
    mirror: str | None = None
    top_k: Sequence[int] | None = None
    group_task: str | Sequence[str] | None = None
    held_out: Any = None

    def check(self) -> None:
        """Refuse tasks that do not exist, data that cannot be had and impossible numbers."""
        for name, least in (("num_items", 1), ("limit", 1), ("num_fewshot", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"eval.{name} must be at least {least}, got {value}")
        _check_tasks(self.tasks, self.mirror, "eval.tasks")

    def check_groups(self, groups: Sequence[str]) -> None:
        """Refuse groups, by name, that have no tasks of their own, and as `check` does."""
        examples = """'eval.group_task="mmlu_{group}"' (quoted like this)"""
        if not self.group_task:
            raise UserError(
                "the calibration set has groups, each with a plan of its own, and nothing says on "
                f"which task a group is evaluated: {examples}, or leave it out (eval=none)"
            )
        for template in self._templates():
            if "{group}" not in template:
                raise UserError(
                    f"eval.group_task={template} is one task for all groups; put {{group}} where "
                    f"a group's name stands: {examples}"
                )
        names = [name for group in groups for name in self.tasks_of(group)]
        _check_tasks(names, self.mirror, f"eval.group_task={self.group_task}")

    def tasks_of(self, group: str) -> list[str]:
        """The tasks of one group."""
        return [template.replace("{group}", group) for template in self._templates()]

    def _templates(self) -> list[str]:
        given = self.group_task or ()
        return [given] if isinstance(given, str) else list(given)


def _check_tasks(tasks: Sequence[str], mirror: str | None, asked: str) -> None:
    others = _others(tasks)
    if unknown := harness.unknown(others) if others else []:
        raise UserError(
            f"{asked} names {unknown}, which lm-eval does not know; ours are "
            f"{', '.join((*tiny.NAMES, *harness.NAMES))}; `lm-eval ls tasks` lists lm-eval's own"
        )
    harness.check_data(others, mirror)


def _others(tasks: Sequence[str]) -> list[str]:
    """The tasks that are not made from the embedded text."""
    return [name for name in tasks if name not in tiny.NAMES]


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
            results |= run_tasks(model, variant.tokenizer(), suite, folder, compute)
        if held_out is not None:
            same = variant.path == dense.path  # perhaps at another number of experts per token
            reference = model if same else dense.load(compute.device)
            top_k = dense.layers()[0].top_k if variant.top_k and same else None
            batches = held_out.batches(compute.batch_size, compute.device)
            found = compare(reference, model, batches, top_k)
            results |= found.figures
            write_whole(folder / ROUTING, json.dumps(found.routed) + "\n")
        write_whole(folder / RESULTS, json.dumps(results, indent=1) + "\n")

    identity = {
        "checkpoint": variant.fingerprint,
        "dense": dense.fingerprint,
        "dtype": variant.dtype,
        "held_out": held_out.fingerprint if held_out else None,
        "code": code_version(*_code(), compare, statistics, observing),
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
    groups = Plan.load(planned.folder / "plan.json").notes["groups"]

    def make(folder: Path) -> None:
        model, tokenizer = dense.load(compute.device), dense.tokenizer()
        results: dict[str, float] = {}
        averages = []
        for number, group in enumerate(groups):
            tasks = suite.tasks_of(group)
            logger.info("evaluate: group %s: %s", group, ", ".join(tasks))
            plan = Plan.load(planned.folder / "plans" / f"{number}.json")
            kept = {edit.index: edit.kept for edit in plan.edited()}
            with restricted(model, kept):
                found = run_tasks(model, tokenizer, replace(suite, tasks=tasks), folder, compute)
            averages += [found.pop("average")] if "average" in found else []
            results |= found
        if averages:
            results["average"] = sum(averages) / len(averages)
        results["groups"] = len(groups)
        write_whole(folder / RESULTS, json.dumps(results, indent=1) + "\n")

    tasks = [name for group in groups for name in suite.tasks_of(group)]
    identity = {
        "dense": dense.fingerprint,
        "dtype": dense.dtype,
        "plan": planned.key,
        "code": code_version(*_code()),
    }
    return store.get("evaluate", identity | _asked(tasks, suite.mirror, options), make)


def _code() -> list[Any]:
    return [evaluate, moe, routing, stand_ins, tiny, items, harness]


def _asked(tasks: Sequence[str], mirror: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """The part of an identity that says what is asked, and of which data."""
    others = _others(tasks)
    embedded = len(others) < len(tasks)
    own = {name: (harness.SST5 / f"{name}.yaml").read_text() for name in harness.NAMES}
    return {
        "tasks": list(tasks),
        "suite": {name: value for name, value in options.items() if name not in NAMED},
        "text": standard_library_fingerprint("test") if embedded else None,
        "datasets": harness.fingerprint(others, mirror) if others and mirror else None,
        "own": {name: own[name] for name in others if name in own},
    }


def results_of(artifact: Artifact) -> dict[str, float]:
    """What `evaluate` found."""
    return json.loads((artifact.folder / RESULTS).read_text())


def run_tasks(
    model: nn.Module, tokenizer: Any, suite: Suite, folder: Path, compute: Compute
) -> dict[str, float]:
    """lm-eval's metrics as <task>/<metric>, and the mean accuracy as average."""
    others = _others(suite.tasks)
    embedded = [name for name in suite.tasks if name not in others]
    local = not others or suite.mirror is not None
    found: dict[str, dict[str, Any]] = {}
    with harness.offline() if local else contextlib.nullcontext(), _quiet():
        from lm_eval import evaluator, simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        evaluator.get_git_commit_hash = str  # it asks git of where we are, which may complain
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=compute.batch_size)
        common = {"model": wrapped, "bootstrap_iters": 0, "num_fewshot": suite.num_fewshot}
        if embedded:
            tiny.write_items(folder, num_items=suite.num_items)
            chosen = [config for config in tiny.configs(folder) if config["task"] in embedded]
            manager = TaskManager(include_defaults=False)
            found |= simple_evaluate(tasks=chosen, task_manager=manager, **common)["results"]
        if others:
            with harness.data_from(others, suite.mirror):
                chosen = harness.load(others)
            common |= {"limit": suite.limit, "task_manager": harness.manager_of(others)}
            found |= simple_evaluate(tasks=chosen, **common)["results"]
    return _flat(found, suite)


def _flat(found: dict[str, dict[str, Any]], suite: Suite) -> dict[str, float]:
    results: dict[str, float] = {}
    accuracies = []
    asked = [name for name in suite.tasks if name in found]  # a tag has no results of its own
    for task in [*asked, *(name for name in found if name not in asked)]:
        metrics = {
            key.removesuffix(",none"): value
            for key, value in found[task].items()
            if isinstance(value, float) and "stderr" not in key
        }
        results |= {f"{task}/{name}": value for name, value in metrics.items()}
        wanted = (suite.metrics or {}).get(task, "acc")
        if task in suite.tasks and wanted in metrics:
            accuracies.append(metrics[wanted])
    if accuracies:
        results["average"] = sum(accuracies) / len(accuracies)
    return results


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence lm-eval's and datasets' talk but not their errors; bars only show in a terminal."""
    names = ("lm_eval", "lm-eval", "datasets")
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.ExitStack() as stack:
            if not sys.stderr.isatty():
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
