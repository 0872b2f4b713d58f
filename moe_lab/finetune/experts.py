"""Expert-only fine-tuning: the experts of edited layers train, nothing else moves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from moe_lab.moe import SHARED_NAMES
from moe_lab.types import Plan, UserError


@dataclass(frozen=True)
class Experts:
    """Train the shared and kept experts of the edited layers by language modelling.

    CD-MoE (2412.00069): routers, attention, norms, embeddings and all other layers are frozen; no
    LoRA. In a condensed layer the whole dense MLP is made of those experts (its constant gates
    lie folded in the down projection). Padding enters no loss. The learning rate rises linearly
    over `warmup_ratio` of the steps, then falls linearly to 0.

    data, validation: sources of text; batch_size: samples per step; validate_every: steps.
    """

    data: Any
    validation: Any
    epochs: int = 1
    batch_size: int = 8
    learning_rate: float = 1e-5
    warmup_ratio: float = 0.1
    weight_decay: float = 0.0
    gradient_clip: float = 1.0
    validate_every: int = 100

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "validate_every"):
            if getattr(self, name) < 1:
                raise UserError(f"finetune.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "gradient_clip"):
            if getattr(self, name) <= 0:
                raise UserError(f"finetune.{name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.warmup_ratio <= 1 or self.weight_decay < 0:
            raise UserError(
                f"finetune.warmup_ratio={self.warmup_ratio} must be from 0 to 1, and "
                f"finetune.weight_decay={self.weight_decay} at least 0"
            )

    def trainable(self, model: nn.Module, plan: Plan) -> dict[str, nn.Parameter]:
        """Names and parameters that train; UserError where the plan edits nothing."""
        named = {}
        for edit in plan.edited():
            block = model.get_submodule(edit.name)
            for name, parameter in block.named_parameters():
                if edit.edit == "condense" or name.split(".")[0] in ("experts", *SHARED_NAMES):
                    named[f"{edit.name}.{name}"] = parameter
        if not named:
            raise UserError("finetune=experts trains the layers that a plan edits; it edits none")
        return named

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Mean next-token cross-entropy over valid targets, in nats."""
        logits = model(**batch, use_cache=False).logits[:, :-1]
        valid = batch["attention_mask"][:, 1:].bool()
        return F.cross_entropy(logits[valid].float(), batch["input_ids"][:, 1:][valid])

    def rate(self, step: int, num_steps: int) -> float:
        """The factor of the learning rate at a step counted from 0."""
        warmup = max(1, round(self.warmup_ratio * num_steps))
        if step < warmup:
            return (step + 1) / warmup
        return (num_steps - step) / max(1, num_steps - warmup)
