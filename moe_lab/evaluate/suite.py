"""What is evaluated: tasks, their data, and what is refused beforehand."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from moe_lab.data.source import Source
from moe_lab.evaluate.decoding.base import (
    DECODING_FILES,
    PLAIN,
    Decoding,
    as_decoding,
    decoding_told,
)
from moe_lab.evaluate.tasks import harness
from moe_lab.evaluate.tasks.tiny.tasks import TINY_NAMES
from moe_lab.option import Option, Plugin, check_options
from moe_lab.types import UserError


@dataclass(frozen=True)
class Suite(Plugin):
    """What is evaluated. Where there is a mirror, datasets are read from it alone."""

    tasks: Annotated[Sequence[str], Option("lm-eval's names, or ours such as tiny_prose")] = ()
    num_items: Annotated[int, Option("items of each embedded task", least=1)] = 200
    limit: Annotated[int | None, Option("items of each other task, null for all", least=1)] = None
    num_fewshot: Annotated[
        int | None, Option("examples before each item, null for the task's own number", least=0)
    ] = None
    metrics: Annotated[
        Mapping[str, str] | None,
        Option("by task, which accuracy enters the average in the place of acc"),
    ] = None
    mirror: Annotated[
        str | None, Option("a folder with the tasks' datasets as <owner>/<name>, not the hub's")
    ] = None
    top_k: Annotated[
        Sequence[int] | None,
        Option(
            "experts per token at which all variants are evaluated too, null for the number that "
            "the recipe ends with",
            least=1,
        ),
    ] = None
    group_task: Annotated[
        str | Sequence[str] | None,
        Option("the tasks of a group of calibration.group_by, its name in the place of {group}"),
    ] = None
    held_out: Annotated[
        Source | None, Option("text for the divergence from the dense model, null for none")
    ] = None
    decoding: Annotated[
        Decoding | str,
        Option("how the tasks' text is decoded, and what log-likelihoods are of",
               files_of=DECODING_FILES),
    ] = PLAIN  # fmt: skip

    @functools.cached_property
    def how(self) -> Decoding:
        """The decoding, which may be given by its name."""
        return as_decoding(self.decoding)

    @classmethod
    def settings(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Of its options a report says the decoding: its name and its own options."""
        return decoding_told(options.get("decoding", PLAIN))

    def check(self) -> None:
        """Refuse tasks that do not exist, data that cannot be had and impossible numbers."""
        check_options(self, "eval")
        if not (self.tasks or self.group_task or self.held_out):
            raise UserError(
                "eval.tasks=[] eval.held_out=null evaluates nothing: name tasks or a text, or "
                "leave it out (eval=none)"
            )
        if self.how.name != PLAIN and not (self.tasks or self.group_task):
            raise UserError(
                f"eval.decoding={self.how.name} decodes the text of tasks, and eval.tasks=[] names "
                "none: figures on held-out text are the model's own. Name tasks "
                "(eval=tiny_generate), or decode greedily (decoding=greedy)"
            )
        if twice := sorted({name for name in self.tasks if list(self.tasks).count(name) > 1}):
            raise UserError(f"eval.tasks names {', '.join(twice)} twice: name each once")
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
