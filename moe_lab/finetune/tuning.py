"""A recipe at work on a loaded model: what trains, and which losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_lab.data.tokens import IGNORED
from moe_lab.finetune import teacher
from moe_lab.finetune.as_stored import compute_as_stored, compute_latent, store_in
from moe_lab.models.checkpoint import Model
from moe_lab.models.layers import SHARED_NAMES, MoELayer, moe_layers
from moe_lab.models.predictions import exact, next_token_logits
from moe_lab.models.rounding import Reads

CHOOSING = "correction_bias"  # what routers add only to choose: no gradient reaches it
OVER_TARGETS = ("loss", "distillation")  # losses that are means over targets, not valid tokens


class Tuning:
    """A recipe at work on one model: what a training loop asks of it.

    trainable: names and parameters that train. weights: how much each loss counts; "loss" counts 1
    where it is not named, and all others are. counts: whether the next forward is of this process's
    text, or only keeps the others company.
    Steps are counted from 0 through all phases, and `num_steps` is their number.
    """

    def __init__(self, model: Model, trainable: Mapping[str, nn.Parameter]):
        self.model = model
        self.trainable = dict(trainable)
        self.weights: dict[str, float] = {}
        self.counts = True

    def as_stored(
        self,
        reader: Callable[[int], Reads | None],
        dtype_of: Callable[[str], torch.dtype | None],
    ) -> None:
        """Compute with the experts of all MoE layers as they will be stored, until the end.

        reader: by the index of a layer; dtype_of: in which dtype tensors are saved, by name.
        """
        for layer in moe_layers(self.model):
            reads = reader(layer.info.index)
            assert reads is not None  # `checks.check_rounding` has refused it
            compute_as_stored(layer, reads)
        store_in(self.model, dtype_of)

    def before_step(self, step: int, num_steps: int) -> None:
        """Make the model ready for a step's forward passes."""

    def before_validation(self) -> None:
        """Make the model what it will be in the end, as far as it can be."""

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums over a batch: OVER_TARGETS over its targets, all others over its valid tokens."""
        return {"loss": next_token_loss(self.model, batch)}

    def after_step(self, step: int, num_steps: int) -> dict[str, Any]:
        """Called behind the update; gives what the curve shall say of the step."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """What changed in training beside the trained parameters; saved with them."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""

    def finish(self) -> None:
        """Leave a plain model behind, ready to be saved."""
        compute_latent(self.model)

    @property
    def is_plain(self) -> bool:
        """Whether the result is the model as it was loaded, but for what `trainable` holds."""
        return type(self).finish is Tuning.finish


class DistillingTuning(Tuning):
    """Learns from the text and from the intact model, which share the loss.

    L = (1 - share) * cross entropy + share * T^2 KL(teacher || student), means over targets.
    """

    def __init__(
        self,
        model: Model,
        trainable: Mapping[str, nn.Parameter],
        share: float,
        temperature: float,
    ):
        super().__init__(model, trainable)
        self.temperature = temperature
        if share:
            self.weights = {"loss": 1 - share, "distillation": share}

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The cross entropy, and where the teacher counts its divergence too."""
        if not self.weights:
            return super().losses(batch)
        logits_NV, labels_N = target_logits(self.model, batch)
        divergence_N = teacher.divergence(batch, logits_NV, self.temperature)
        loss = F.cross_entropy(logits_NV, labels_N, reduction="sum")
        return {"loss": loss, "distillation": divergence_N.sum()}


def next_token_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The sum of next-token cross-entropies over a batch's targets (`labels`), in nats."""
    return F.cross_entropy(*target_logits(model, batch), reduction="sum")


def target_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The logits [N, V], in float32 or better, and the ids [N] of a batch's targets (`labels`)."""
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    labels = batch["labels"][:, 1:]
    targets = labels != IGNORED
    return exact(next_token_logits(model, inputs, targets)), labels[targets]


def trained(model: nn.Module, layers: Sequence[MoELayer], trains: str) -> dict[str, nn.Parameter]:
    """Names and parameters that train, by one of `recipe.Trains`."""
    if trains == "all":
        return dict(model.named_parameters())
    chosen: dict[str, nn.Parameter] = {}
    for layer in layers:
        for name, parameter in layer.block.named_parameters():
            is_expert = name.split(".")[0] in ("experts", *SHARED_NAMES)
            is_router = any(parameter is own for own in layer.router.parameters())
            is_router = is_router and not name.endswith(CHOOSING)
            if (is_expert and trains != "routers") or (is_router and trains != "experts"):
                chosen[f"{layer.info.name}.{name}"] = parameter
    return chosen
