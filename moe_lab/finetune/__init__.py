"""Fine-tuning recipes: what is trainable, which loss; and the phases that a recipe goes through."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_lab.types import UserError

SCHEDULES = ("linear", "cosine", "constant")


@dataclass(frozen=True)
class Phase:
    """One pass of a recipe over its own data, with an optimizer of its own.

    data, validation: sources of text, or of prompts with answers, which say their own max_length
    (validation may be null); batch_size: samples in one forward; gradient_accumulation: forwards
    whose gradients add up to one step; schedule: of the learning rate, after it has risen over
    `warmup_ratio` of the steps.
    """

    data: Any
    validation: Any = None
    epochs: int = 1
    batch_size: int = 8
    gradient_accumulation: int = 1
    learning_rate: float = 1e-5
    schedule: str = "linear"
    warmup_ratio: float = 0.1
    weight_decay: float = 0.0

    def check(self, name: str) -> None:
        """Refuse impossible numbers with a UserError that says `name`, the phase's own."""
        if self.schedule not in SCHEDULES:
            raise UserError(f"{name}.schedule={self.schedule}: there are {', '.join(SCHEDULES)}")
        for field in ("epochs", "batch_size", "gradient_accumulation"):
            if getattr(self, field) < 1:
                raise UserError(f"{name}.{field}={getattr(self, field)}: it must be at least 1")
        if self.learning_rate <= 0:
            raise UserError(f"{name}.learning_rate={self.learning_rate}: it must be above 0")
        if not 0 <= self.warmup_ratio <= 1:
            raise UserError(f"{name}.warmup_ratio={self.warmup_ratio}: it must be from 0 to 1")
        if self.weight_decay < 0:
            raise UserError(f"{name}.weight_decay={self.weight_decay}: it must be at least 0")

    @property
    def step_size(self) -> int:
        """Samples of one step, over all forwards and processes."""
        return self.batch_size * self.gradient_accumulation

    def rate(self, step: int, num_steps: int) -> float:
        """The factor of the learning rate at a step counted from 0."""
        warmup = max(1, round(self.warmup_ratio * num_steps))
        if step < warmup:
            return (step + 1) / warmup
        rest = (num_steps - step) / max(1, num_steps - warmup)
        if self.schedule == "cosine":
            return (1 - math.cos(math.pi * rest)) / 2
        return rest if self.schedule == "linear" else 1.0


def sources(phases: Mapping[str, Phase]) -> dict[str, Any]:
    """All text of the phases: "<name>/data", and "<name>/validation" where there is one."""
    found = {}
    for name, phase in phases.items():
        found[f"{name}/data"] = phase.data
        if phase.validation is not None:
            found[f"{name}/validation"] = phase.validation
    return found
