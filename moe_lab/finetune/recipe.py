"""Fine-tuning recipes: what is trainable, which loss; and the phases that a recipe goes through."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from moe_lab.data.source import Source
from moe_lab.finetune.tuning import Tuning
from moe_lab.models.checkpoint import Model
from moe_lab.models.edits.plan import Plan
from moe_lab.option import Option, Plugin, check_options, declared_by
from moe_lab.types import LayerInfo, UserError

SCHEDULES = ("linear", "cosine", "constant")
COMPUTING_DTYPES = ("float32", "bfloat16")
# What trains, for recipes that ask.
Trains = Annotated[
    str,
    Option(
        "which parameters train: of MoE layers the experts (shared ones too), the routers or both; "
        "or all of the model's",
        among=("experts", "routers", "both", "all"),
    ),
]


@dataclass(frozen=True)
class Phase:
    """One pass of a recipe over its own data, with an optimizer of its own.

    Its sources are of text, or of prompts with answers, and say their own max_length.
    """

    data: Annotated[Source, Option("the text that is learned")]
    validation: Annotated[Source | None, Option("the text of the curve's validation loss")] = None
    epochs: Annotated[int, Option("passes over the text", least=1)] = 1
    batch_size: Annotated[int, Option("samples in a forward", least=1)] = 8
    gradient_accumulation: Annotated[
        int, Option("forwards whose gradients add up to one step", least=1)
    ] = 1
    learning_rate: Annotated[float, Option("the highest, behind the warm-up", above=0)] = 1e-5
    schedule: Annotated[
        str, Option("how the learning rate falls behind the warm-up", among=SCHEDULES)
    ] = "linear"
    warmup_ratio: Annotated[
        float, Option("share of the steps in which the learning rate rises", least=0, most=1)
    ] = 0.1
    weight_decay: Annotated[float, Option("AdamW's", least=0)] = 0.0
    num_steps: Annotated[int | None, Option("steps in all, in the place of epochs", least=1)] = None

    def check(self, name: str) -> None:
        """Refuse impossible numbers with a UserError that says `name`, the phase's own."""
        check_options(self, name)

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
class Recipe(Plugin):
    """The base of recipes: their phases, and how to compute.

    A recipe says what trains and with which loss: `prepare` gives the `Tuning` that the training
    loop works with. All else has an answer here. What trains is kept in float32 whatever the dtype.
    """

    phases: Annotated[dict[str, Phase], Option("by name, in order; null leaves one out")]
    dtype: Annotated[str, Option("of the computing", among=COMPUTING_DTYPES)] = "float32"
    gradient_checkpointing: Annotated[
        bool, Option("compute a layer's activations again in the backward pass, to save memory")
    ] = False
    gradient_clip: Annotated[float, Option("largest norm of a step's gradient", above=0)] = 1.0
    validate_every: Annotated[int, Option("steps between validations", least=1)] = 100

    @property
    def needs_edits(self) -> bool:
        """Whether it only makes sense behind a compression."""
        return True

    @property
    def rounds(self) -> bool:
        """Whether it computes with the experts as the run's quantizer will store them."""
        return False

    @property
    def distils(self) -> bool:
        """Whether it learns from the intact model; then it is a `Distilling` recipe."""
        return False

    @property
    def twins(self) -> float:
        """The largest share of the parameters that saving may add as copies of experts."""
        return 0.0

    @property
    def final_top_k(self) -> int | None:
        """Experts per token in the end, at which all variants are compared; None: the model's."""
        return None

    @classmethod
    def settings(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """What a report says of its composed options: those that are its own, null ones too."""
        own = declared_by(cls).keys() - declared_by(Recipe).keys()
        return {
            name: value
            for name, value in options.items()
            if name in own and not isinstance(value, Mapping)
        }

    def identity(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Its composed options without where text comes from: fingerprints say what that is."""
        kept = copy.deepcopy(dict(options))
        for phase in kept["phases"].values():
            for name in ("data", "validation"):
                (phase or {}).pop(name, None)
        return kept

    def __post_init__(self) -> None:
        given = {name: phase for name, phase in (self.phases or {}).items() if phase is not None}
        object.__setattr__(self, "phases", given)
        if not given:
            raise UserError("finetune.phases is empty: give one, or leave it out: finetune=none")
        for name, phase in given.items():
            phase.check(f"finetune.phases.{name}")
        check_options(self, "finetune")

    def check(self, plan: Plan) -> None:
        """Refuse a plan that leaves nothing to train, before any weight is read."""
        if self.needs_edits and not plan.edited():
            raise UserError("the plan changes nothing, so this recipe has nothing to train")
        if len({edit.removes_decoder for edit in plan.edited()}) > 1:
            raise UserError("a plan that drops whole layers and edits others cannot be fine-tuned")

    def check_model(self, config: Any, layers: Sequence[LayerInfo]) -> None:
        """Refuse a model of this config with which the recipe cannot work."""

    def check_steps(self, num_steps: int) -> None:
        """Refuse, or say, what so many steps in all cannot do."""

    def prepare(self, model: Model, plan: Plan) -> Tuning:
        """The recipe at work on a loaded model that the plan was carried out on."""
        raise NotImplementedError


@dataclass(frozen=True)
class Distilling(Recipe):
    """A recipe that may learn from the intact model's next-token distributions (`teacher`).

    Of a distribution's tokens those that are not kept count as one.
    """

    temperature: Annotated[
        float, Option("of the intact model's and the trained one's softmax", above=0)
    ] = 1.0
    teacher_top_k: Annotated[
        int | None,
        Option("likeliest tokens that are kept of the intact model's, null for all", least=1),
    ] = 128


def check_moe_left(plan: Plan) -> None:
    """Refuse a plan after which no MoE layer is left to train."""
    if plan.edits and not any(chain.leaves_moe for chain in plan.chains()):
        raise UserError("this recipe trains MoE layers, and the plan leaves none")
