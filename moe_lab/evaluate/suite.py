"""What is evaluated: tasks, their data, and what is refused beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moe_lab.data.source import Texts
from moe_lab.evaluate.tasks import harness
from moe_lab.evaluate.tasks.tiny.tasks import TINY_NAMES
from moe_lab.types import UserError


@dataclass(frozen=True)
class Suite:
    """What is evaluated.

    tasks: names that lm-eval knows, or of our own (`tasks/`); num_items: per embedded task
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
    held_out: Texts | None = None

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
    others = others_of(tasks)
    if unknown := harness.unknown(others) if others else []:
        raise UserError(
            f"{asked} names {unknown}, which lm-eval does not know; ours are "
            f"{', '.join((*TINY_NAMES, *harness.HARNESS_NAMES))}; `lm-eval ls tasks` lists its own"
        )
    harness.check_data(others, mirror)


def others_of(tasks: Sequence[str]) -> list[str]:
    """The tasks that are not made from the embedded text."""
    return [name for name in tasks if name not in TINY_NAMES]
