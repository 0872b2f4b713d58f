"""Tasks on a model in this process, through lm-eval."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moe_lab import processes
from moe_lab.data.tokens import Tokenizer
from moe_lab.evaluate.built_tasks import built_tasks
from moe_lab.evaluate.continuations import BATCH_TOKENS
from moe_lab.evaluate.suite import Suite, others_of
from moe_lab.evaluate.tasks import harness
from moe_lab.finite import check_number
from moe_lab.models.checkpoint import Model
from moe_lab.types import NotFinite


def run_tasks(
    model: Model,
    tokenizer: Tokenizer,
    suite: Suite,
    folder: Path,
    batch_size: int,
    batch_tokens: int = BATCH_TOKENS,
) -> dict[str, float]:
    """lm-eval's metrics as <task>/<metric>, and the mean accuracy as average.

    The same in each of several processes, which share the requests (`WatchedLM`). UserError where
    the model's routers do not obey the suite's decoding.
    """
    local = not others_of(suite.tasks) or suite.mirror is not None
    results: dict[str, dict[str, Any]] = {}
    offline = harness.offline() if local else contextlib.nullcontext()
    with suite.how.opened(model) as decoder, offline, _quiet():
        from lm_eval import evaluator, simple_evaluate

        from moe_lab.evaluate.watched import WatchedLM

        evaluator.get_git_commit_hash = str  # it asks git of where we are, which may complain
        built = built_tasks(suite, folder)
        wrapped = WatchedLM(decoder, batch_tokens, tokenizer=tokenizer, batch_size=batch_size)
        common = {"model": wrapped, "bootstrap_iters": 0, "num_fewshot": suite.num_fewshot}
        for tasks in (built.embedded, built.others):
            if tasks:
                results |= _evaluated(simple_evaluate, log_samples=False, **common, **tasks)
    return _flat(results, suite)


def _evaluated(evaluate: Callable[..., Any], **options: Any) -> dict[str, dict[str, Any]]:
    """Its results by task; NotFinite where a score is a number that is none."""
    try:
        found = evaluate(**options) or {"results": {}}  # lm-eval's for all but the first process
    except OverflowError as error:
        raise NotFinite(
            "a perplexity of the tasks is more than a number can be: the model's loss is far too "
            "large"
        ) from error
    results: dict[str, dict[str, Any]] = processes.broadcast(found["results"])
    for task, metrics in results.items():
        for name, value in metrics.items():
            if isinstance(value, float) and "stderr" not in name:
                check_number(value, f"task {task}: {name.removesuffix(',none')}")
    return results


def _flat(by_task: dict[str, dict[str, Any]], suite: Suite) -> dict[str, float]:
    results: dict[str, float] = {}
    accuracies = []
    asked = [name for name in suite.tasks if name in by_task]  # a tag has no results of its own
    for task in [*asked, *(name for name in by_task if name not in asked)]:
        metrics = {
            key.removesuffix(",none"): value
            for key, value in by_task[task].items()
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
