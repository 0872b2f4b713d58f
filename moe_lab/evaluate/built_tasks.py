"""The tasks of a suite with their requests, built once in a process: no model changes them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_lab import processes
from moe_lab.data.embedded import standard_library_fingerprint
from moe_lab.evaluate.suite import Suite, others_of
from moe_lab.evaluate.tasks import harness
from moe_lab.evaluate.tasks.tiny.tasks import configs, write_items

SUITES_KEPT = 8  # suites; a run has one, or one for each group
TEMPLATES = 1024


@dataclass(frozen=True)
class BuiltTasks:
    """What `simple_evaluate` takes, by its names; empty where a suite has no such tasks.

    embedded: of the tasks that are made from the embedded text; others: of all others.
    """

    embedded: dict[str, Any] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)


def built_tasks(suite: Suite, folder: Path) -> BuiltTasks:
    """Those of a suite; folder: where items are written, if they are built now."""
    others = others_of(suite.tasks)
    asked = suite.num_items, suite.limit, suite.num_fewshot, suite.mirror
    data = (
        standard_library_fingerprint("test") if len(others) < len(suite.tasks) else None,
        harness.fingerprint(others, suite.mirror) if others and suite.mirror else None,
    )
    key = (tuple(suite.tasks), *asked, *data)
    if key not in _kept:
        while len(_kept) >= SUITES_KEPT:
            del _kept[next(iter(_kept))]
        _kept[key] = _built(suite, others, folder)
    return _kept[key]


_kept: dict[tuple[object, ...], BuiltTasks] = {}


def _built(suite: Suite, others: list[str], folder: Path) -> BuiltTasks:
    from lm_eval.tasks import TaskManager

    _compile_templates_once()
    made = BuiltTasks()
    if len(others) < len(suite.tasks):
        if processes.is_main():
            write_items(folder, num_items=suite.num_items)
        processes.wait()
        manager = TaskManager(include_defaults=False)
        chosen = [config for config in configs(folder) if config["task"] in suite.tasks]
        tasks = list(manager.load(chosen)["tasks"].values())
        made.embedded.update(tasks=tasks, task_manager=manager)
        _build_once(tasks)
    if others:
        manager = harness.manager_of(others)
        with processes.main_first(), harness.data_from(others, suite.mirror):
            tasks = harness.load_tasks(others)
        made.others.update(tasks=tasks, task_manager=manager, limit=suite.limit)
        _build_once(manager.load(tasks)["tasks"].values())
    return made


def _build_once(tasks: Iterable[Any]) -> None:
    """Have each of lm-eval's tasks build its requests when it first does; then empty its answers.

    lm-eval sets its seeds before each evaluation, so that requests are the same ones every time.
    """
    for task in tasks:
        task.build_all_requests = _once(task, task.build_all_requests)


def _once(task: Any, build: Callable[..., None]) -> Callable[..., None]:
    built = False

    def build_or_empty(**options: Any) -> None:
        nonlocal built
        if not built:
            build(**options)
            built = True
        for one in task.instances:
            one.resps, one.filtered_resps = [], {}

    return build_or_empty


@functools.cache
def _compile_templates_once() -> None:
    """lm-eval compiles a template anew for every document and field."""
    from lm_eval import utils

    utils.env.from_string = functools.lru_cache(TEMPLATES)(utils.env.from_string)
