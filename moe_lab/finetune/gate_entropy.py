"""The entropy of the routers, heard while a model computes (SEER-MoE, 2404.05089)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moe_lab.models import routers
from moe_lab.models.layers import MoELayer
from moe_lab.models.predictions import exact
from moe_lab.types import UserError


class GateEntropy:
    """Sums the entropy of the routers' distributions, layer by layer, in forward passes.

    Hooks stay on the routers until `close`, and what they hear inside `of` counts. In the backward
    pass, gradient checkpointing runs the layers again and must find the same operations in them:
    hooks go on computing behind `of`, for nobody.
    """

    def __init__(self, layers: Sequence[MoELayer]):
        self.valid: Tensor | None = None
        self.differentiable = True
        self.sums: list[Tensor] = []
        self.heard: list[Tensor] = []
        self.scoring = {layer.router: _scoring(layer) for layer in layers}
        self.handles = [layer.router.register_forward_hook(self._hear) for layer in layers]

    def of(self, valid: Tensor, differentiable: bool) -> GateEntropy:
        """Listen, as a context manager, to the tokens of one batch where `valid` [T] is true."""
        self.valid, self.differentiable, self.sums = valid, differentiable, []
        return self

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        self.heard, self.sums = self.sums, []

    def _hear(self, router: nn.Module, args: object, output: tuple[Tensor, ...]) -> None:
        if self.valid is None:
            return
        logits_TE = output[0].reshape(len(self.valid), -1)[self.valid]
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            self.sums.append(entropy(logits_TE, self.scoring[router]).sum())

    def mean(self) -> Tensor:
        """The mean over layers of the summed entropy, in nats."""
        return torch.stack(self.heard).mean()

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()


def _scoring(layer: MoELayer) -> str:
    name = routers.scoring(layer)
    if name is None:
        raise UserError(
            f"the router of layer {layer.info.index} gives weights that follow none of the known "
            f"scorings ({', '.join(routers.SCORINGS)}), so that its entropy is not defined: "
            "finetune=experts does without it"
        )
    return name


def entropy(logits_TE: Tensor, scoring: str) -> Tensor:
    """H(p) = -sum_i p_i log p_i [T] in nats of each token's distribution over all experts.

    p is the softmax of the logits, or another scoring's scores divided by their sum; computed in
    at least float32.
    """
    logits_TE = exact(logits_TE)
    if scoring == "softmax":
        log_p = logits_TE.log_softmax(dim=-1)
    else:
        scores = routers.SCORINGS[scoring](logits_TE)
        log_p = (scores / scores.sum(dim=-1, keepdim=True)).clamp(min=1e-30).log()
    return -(log_p.exp() * log_p).sum(dim=-1)
