"""Fine-tuning recipes: what is trainable, which loss; and the phases that a recipe goes through.

A recipe is its options. It has `phases`, `dtype`, `gradient_checkpointing`, `gradient_clip` and
`validate_every` (a `Recipe`); `needs_edits`, whether it only makes sense behind a compression;
`distils`, whether it learns from the intact model (a `Distilling` recipe); `check(plan)` and
`check_model(config, layers)`, which refuse the impossible before any work; and
`prepare(model, plan)`, which gives the `Tuning` that a training loop works with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from moe_lab.data.tokens import Tokenizer, Tokens
from moe_lab.finetune.tuning import Tuning
from moe_lab.models.checkpoint import Model
from moe_lab.models.edits.plan import Plan
from moe_lab.types import LayerInfo, UserError

SCHEDULES = ("linear", "cosine", "constant")
COMPUTING_DTYPES = ("float32", "bfloat16")
TRAINS = ("experts", "routers", "both", "all")


class Source(Protocol):
    """Where text comes from (`data/`)."""

    def tokens(self, tokenizer: Tokenizer) -> Tokens:
        """Its samples."""
        ...

    def sources(self) -> Sequence[str]:
        """Each source with its split, in words."""
        ...


@dataclass(frozen=True)
class Phase:
    """One pass of a recipe over its own data, with an optimizer of its own.

    data, validation: sources of text, or of prompts with answers, which say their own max_length
    (validation may be null); batch_size: samples in one forward; gradient_accumulation: forwards
    whose gradients add up to one step; num_steps: steps in all, in the place of `epochs`;
    schedule: of the learning rate, after it has risen over `warmup_ratio` of the steps.
    """

    data: Source
    validation: Source | None = None
    epochs: int = 1
    batch_size: int = 8
    gradient_accumulation: int = 1
    learning_rate: float = 1e-5
    schedule: str = "linear"
    warmup_ratio: float = 0.1
    weight_decay: float = 0.0
    num_steps: int | None = None

    def check(self, name: str) -> None:
        """Refuse impossible numbers with a UserError that says `name`, the phase's own."""
        if self.schedule not in SCHEDULES:
            raise UserError(f"{name}.schedule={self.schedule}: there are {', '.join(SCHEDULES)}")
        for field in ("epochs", "batch_size", "gradient_accumulation"):
            if getattr(self, field) < 1:
                raise UserError(f"{name}.{field}={getattr(self, field)}: it must be at least 1")
        if self.num_steps is not None and self.num_steps < 1:
            raise UserError(f"{name}.num_steps={self.num_steps}: it must be at least 1, or null")
        if self.learning_rate <= 0:
            raise UserError(f"{name}.learning_rate={self.learning_rate}: it must be above 0")
        if not 0 <= self.warmup_ratio <= 1:
            raise UserError(f"{name}.warmup_ratio={self.warmup_ratio}: it must be from 0 to 1")
        if self.weight_decay < 0:
            raise UserError(f"{name}.weight_decay={self.weight_decay}: it must be at least 0")

    def steps(self, num_samples: int) -> int:
        """Steps over so many samples of data."""
        return self.num_steps or self.epochs * -(-num_samples // self.step_size)

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


def sources(phases: Mapping[str, Phase]) -> dict[str, Source]:
    """All text of the phases: "<name>/data", and "<name>/validation" where there is one."""
    texts = {}
    for name, phase in phases.items():
        texts[f"{name}/data"] = phase.data
        if phase.validation is not None:
            texts[f"{name}/validation"] = phase.validation
    return texts


@dataclass(frozen=True)
class Recipe:
    """What all recipes say: their phases, and how to compute.

    phases: a Phase by name, in order; null leaves one out. dtype: of the computing; what trains is
    kept in float32. gradient_checkpointing: compute a layer's activations again in the backward
    pass. gradient_clip: largest norm of a step's gradient. validate_every: steps.
    """

    phases: dict[str, Phase]
    dtype: str = "float32"
    gradient_checkpointing: bool = False
    gradient_clip: float = 1.0
    validate_every: int = 100

    needs_edits = True

    @property
    def distils(self) -> bool:
        """Whether there is a teacher."""
        return False

    def __post_init__(self) -> None:
        given = {name: phase for name, phase in (self.phases or {}).items() if phase is not None}
        object.__setattr__(self, "phases", given)
        if not given:
            raise UserError("finetune.phases is empty: give one, or leave it out: finetune=none")
        for name, phase in given.items():
            phase.check(f"finetune.phases.{name}")
        if self.dtype not in COMPUTING_DTYPES:
            raise UserError(f"finetune.dtype={self.dtype}: there are {', '.join(COMPUTING_DTYPES)}")
        if self.gradient_clip <= 0:
            raise UserError(f"finetune.gradient_clip={self.gradient_clip}: it must be above 0")
        if self.validate_every < 1:
            raise UserError(f"finetune.validate_every={self.validate_every}: it must be at least 1")

    def check(self, plan: Plan) -> None:
        """Refuse a plan that leaves nothing to train, before any weight is read."""
        if self.needs_edits and not plan.edited():
            raise UserError("the plan changes nothing, so this recipe has nothing to train")
        if len({edit.removes_decoder for edit in plan.edited()}) > 1:
            raise UserError("a plan that drops whole layers and edits others cannot be fine-tuned")

    def check_model(self, config: Any, layers: Sequence[LayerInfo]) -> None:
        """Refuse a model of this config with which the recipe cannot work."""

    def code(self) -> list[object]:
        """The modules that decide the result beside the recipe's own."""
        return []

    def prepare(self, model: Model, plan: Plan) -> Tuning:
        """The recipe at work on a loaded model that the plan was carried out on."""
        raise NotImplementedError


@dataclass(frozen=True)
class Distilling(Recipe):
    """A recipe that may learn from the intact model's next-token distributions (`teacher`).

    temperature: T of both softmaxes. teacher_top_k: the likeliest tokens of each distribution that
    are kept, the others counting as one; None keeps all.
    """

    temperature: float = 1.0
    teacher_top_k: int | None = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise UserError(f"finetune.temperature={self.temperature}: it must be above 0")
        if self.teacher_top_k is not None and self.teacher_top_k < 1:
            raise UserError(
                f"finetune.teacher_top_k={self.teacher_top_k}: it must be at least 1, or null for "
                "the whole vocabulary"
            )


def check_trains(trains: str) -> None:
    """Refuse what is none of TRAINS."""
    if trains not in TRAINS:
        raise UserError(f"finetune.trains={trains}: there are {', '.join(TRAINS)}")


def check_moe_left(plan: Plan) -> None:
    """Refuse a plan after which no MoE layer is left to train."""
    if plan.edits and not any(chain.leaves_moe for chain in plan.chains()):
        raise UserError("this recipe trains MoE layers, and the plan leaves none")
