"""SEER-MoE's second stage: fine-tuning towards fewer experts for each token (2404.05089)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from moe_lab import processes
from moe_lab.finetune.gate_entropy import GateEntropy
from moe_lab.finetune.recipe import Recipe, Trains, check_moe_left
from moe_lab.finetune.tuning import Tuning, next_token_loss, trained
from moe_lab.models import routers
from moe_lab.models.checkpoint import Model, meta_model
from moe_lab.models.edits.plan import Plan
from moe_lab.models.layers import moe_layers
from moe_lab.option import Option
from moe_lab.types import LayerInfo, UserError

logger = logging.getLogger(__name__)


def linear(progress: float, first: int, last: int) -> float:
    """The number of experts falls in a straight line; steps with more and with fewer take turns."""
    return first + (last - first) * progress


def staircase(progress: float, first: int, last: int) -> float:
    """Every number of experts on the way gets as many steps as the others."""
    stairs = first - last + 1
    return first - min(stairs - 1, int(progress * stairs))


def at_once(progress: float, first: int, last: int) -> float:
    """The last number of experts from the first step on: no annealing."""
    return last


ANNEALING: dict[str, Callable[[float, int, int], float]] = {
    "linear": linear,
    "staircase": staircase,
    "at_once": at_once,
}


@dataclass(frozen=True)
class Seer(Recipe):
    """Fine-tuning with gate-entropy regularisation and top-k annealing.

    SEER-MoE (2404.05089): L = L_task + lambda * mean over MoE layers l and tokens x of H(p^l(x)),
    where p is the router's full distribution and H(p) = -sum_i p_i log p_i in nats; over valid
    tokens here, padding left out. Meanwhile the number k of experts for each token goes from the
    model's to `top_k`, which is then written into the config. How it goes there the paper does not
    say, nor how the mean is taken; its lambda is 0.1.

    With one expert for each token an expert's twin changes nothing, and where layers differ in
    their number of experts twins let them load in stock transformers. With one expert for each
    token and renormalised weights (Mixtral's), that weight is always 1: then the entropy alone
    trains the routers.
    """

    top_k: Annotated[
        int | None, Option("experts per token in the end, null for the model's", least=1)
    ] = 1
    entropy: Annotated[
        float, Option("lambda, the weight of the routers' entropy in the loss", least=0)
    ] = 0.1
    annealing: Annotated[
        str,
        Option("how the number of experts per token falls", among=tuple(ANNEALING)),
    ] = "linear"
    annealed_at: Annotated[
        float, Option("share of the steps after which it has fallen", least=0, most=1)
    ] = 0.8
    trains: Trains = "both"
    twins: Annotated[
        float,
        Option(
            "largest share of the parameters that may be added as copies of experts, with one "
            "expert per token in the end, to load in stock transformers",
            least=0,
        ),
    ] = 1.0

    needs_edits = False

    @property
    def final_top_k(self) -> int | None:
        """As `top_k` says."""
        return self.top_k

    def check(self, plan: Plan) -> None:
        """Refuse a plan after which no MoE layer is left to train."""
        super().check(plan)
        check_moe_left(plan)

    def check_model(self, config: Any, layers: Sequence[LayerInfo]) -> None:
        """Refuse more experts per token than the model has, and routers that do not obey."""
        most = layers[0].top_k
        if self.top_k is None or self.top_k == most:
            return
        if self.top_k > most:
            raise UserError(
                f"finetune.top_k={self.top_k}: the model gives a token {most} experts, and "
                f"annealing goes down: ask for 1 to {most}"
            )
        model = meta_model(config)
        routers.set_top_k(model, self.top_k)
        router_alone = self.trains == "routers" and self.entropy == 0
        always_one = self.top_k == 1 and (self.annealing == "at_once" or self.annealed_at == 0)
        if router_alone and always_one and not routers.learns_with_one(moe_layers(model)[0]):
            raise UserError(
                "with one expert for each token this family's router weights are always 1, so that "
                "the task's loss has no gradient for routers, and nothing else trains: "
                "finetune.annealing=linear, finetune.entropy above 0, or finetune.trains=both"
            )

    def check_steps(self, num_steps: int) -> None:
        """Say where no step is trained with the number of experts that the result will have."""
        if self.top_k is not None and self.annealed_at < 1 and self.annealing != "at_once":
            with_last = num_steps - math.ceil(self.annealed_at * num_steps)
            if with_last < 1:
                logger.warning(
                    "finetune.top_k=%d: of %d steps none is trained with as many experts, since "
                    "their number falls until finetune.annealed_at=%g of them: ask for more steps",
                    self.top_k, num_steps, self.annealed_at,
                )  # fmt: skip

    def k_at(self, step: int, num_steps: int, first: int) -> int:
        """Experts per token at a step (counted from 0) of a model that began with `first`.

        Where the schedule is between two numbers, steps of both take turns so that their mean over
        the steps so far is the schedule's.
        """
        last = first if self.top_k is None else min(first, self.top_k)
        annealed = self.annealed_at * num_steps

        def wanted(number: int) -> float:
            done = number >= annealed
            return float(
                last if done else ANNEALING[self.annealing](number / annealed, first, last)
            )

        if wanted(step).is_integer():
            return int(wanted(step))
        before = sum(wanted(number) % 1 for number in range(step))
        return math.floor(wanted(step)) + int(before + wanted(step) % 1) - int(before)

    def prepare(self, model: Model, plan: Plan) -> SeerTuning:
        """The recipe at work on a loaded model."""
        return SeerTuning(self, model)


class SeerTuning(Tuning):
    """Follows the schedule of k, and adds the routers' entropy to the loss."""

    def __init__(self, recipe: Seer, model: Model):
        layers = moe_layers(model)
        super().__init__(model, trained(model, layers, recipe.trains))
        self.recipe = recipe
        self.weights = {"entropy": recipe.entropy}
        self.entropy = GateEntropy(layers)
        self.first = self.top_k = layers[0].info.top_k
        self.last = self.first if recipe.top_k is None else min(self.first, recipe.top_k)
        # Tokens that had a first, second, … expert: in all, and of this process's part of a step.
        self.tokens = torch.zeros(self.first, dtype=torch.float64)
        self.step_tokens = torch.zeros_like(self.tokens)

    def before_step(self, step: int, num_steps: int) -> None:
        """Set the step's number of experts per token."""
        self._set(self.recipe.k_at(step, num_steps, self.first))

    def before_validation(self) -> None:
        """Validation is with the number of experts that the result will have."""
        self._set(self.last)

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The task's loss, and the mean over layers of the summed entropy of valid tokens."""
        valid = batch["attention_mask"].bool().reshape(-1)
        if torch.is_grad_enabled() and self.counts:
            self.step_tokens[: self.top_k] += valid.sum().item()
        with self.entropy.of(valid, differentiable=self.recipe.entropy > 0):
            loss = next_token_loss(self.model, batch)
        return {"loss": loss, "entropy": self.entropy.mean()}

    def after_step(self, step: int, num_steps: int) -> dict[str, Any]:
        """How many experts a token got in this step, and which share of all tokens had a k-th."""
        self.tokens += processes.total(self.step_tokens)
        self.step_tokens.zero_()
        shares = (self.tokens / self.tokens[0].clamp(min=1)).tolist()
        used = {f"used_expert_{rank}": share for rank, share in enumerate(shares, start=1)}
        return {"top_k": self.recipe.k_at(step, num_steps, self.first)} | used

    def state(self) -> dict[str, Tensor]:
        """How many tokens had a first, second, … expert."""
        return {"tokens": self.tokens}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on counting."""
        self.tokens = state["tokens"].clone()

    def finish(self) -> None:
        """The result has its number of experts per token in its config."""
        self.entropy.close()
        self._set(self.last)

    def _set(self, top_k: int) -> None:
        if top_k != self.top_k:
            routers.set_top_k(self.model, top_k)
            self.top_k = top_k
