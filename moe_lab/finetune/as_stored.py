"""Experts that compute in training as they will be stored: quantisation-aware tuning.

Latent weights train; the forward pass computes with what a reader makes of their levels, and the
gradient goes straight through the rounding (1308.3432), as if it were not there. Letters: E
experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from moe_lab.models.adapters.base import AdaptedExperts
from moe_lab.models.expert_matrices import expert_matrices
from moe_lab.models.hidden_units import HiddenUnits
from moe_lab.models.layers import MoELayer
from moe_lab.models.rounding import Reads
from moe_lab.models.widths import widths_of
from moe_lab.types import UserError


class _StraightThrough(torch.autograd.Function):
    """Other values, to which the gradient is that of the latent ones."""

    @staticmethod
    def forward(context: Any, latent: Tensor, values: Tensor) -> Tensor:
        return values

    @staticmethod
    def backward(context: Any, *gradients: Any) -> tuple[Tensor, None]:
        return gradients[0], None


class AsStored(nn.Module):
    """What a reader makes of latent weights [E, ...] of all experts of a layer.

    reads: of each matrix in the dtype in which it is stored; turned: whether inputs come before
    outputs; widths: how many inputs of each expert are its own, where they are not all the same.
    """

    def __init__(self, reads: Reads, turned: bool, widths: tuple[int, ...] | None):
        super().__init__()
        self.reads, self.turned, self.widths = reads, turned, widths
        self.dtype: torch.dtype | None = None  # in which they are stored; None: the latent ones'

    def forward(self, latent: Tensor) -> Tensor:
        apply: Callable[..., Tensor] = _StraightThrough.apply
        return apply(latent, self.stored(latent.detach()))

    @torch.no_grad()
    def stored(self, latent: Tensor) -> Tensor:
        """The values, in the dtype of the latent weights."""
        matrices = latent.to(self.dtype or latent.dtype)
        matrices = matrices.mT if self.turned else matrices
        read = self.reads(matrices) if self.widths is None else self._each(matrices, self.widths)
        return (read.mT if self.turned else read).to(latent.dtype)

    def _each(self, matrices: Tensor, widths: tuple[int, ...]) -> Tensor:
        read = torch.zeros_like(matrices)
        for expert, width in enumerate(widths):
            if width:
                read[expert, :, :width] = self.reads(matrices[expert, :, :width])
        return read


def compute_as_stored(layer: MoELayer, reads: Reads) -> None:
    """Let the experts of a layer compute with what a reader makes of their weights, in place.

    Their parameters stay the same objects, under other names until `compute_latent`.
    """
    experts: Any = layer.experts
    if isinstance(experts, AdaptedExperts):
        raise UserError(
            f"finetune.quantization_aware=true: {layer.info.family} holds its experts in tensors "
            "of its own: quantise it without, finetune.quantization_aware=false"
        )
    widths = widths_of(experts)
    uneven = widths if len(set(widths)) > 1 else None
    down = HiddenUnits(experts).down
    for name in expert_matrices(experts):
        of_units = uneven if name == down else None
        made = AsStored(reads, bool(experts.is_transposed), of_units)
        parametrize.register_parametrization(experts, name, made, unsafe=True)


def compute_latent(model: nn.Module) -> None:
    """Take out again what `compute_as_stored` put into a model: plain latent weights are left."""
    for module in list(model.modules()):
        for name in _roundings(module):
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)


def store_in(model: nn.Module, dtype_of: Callable[[str], torch.dtype | None]) -> None:
    """Say in which dtype weights are stored, by their names in the plain model."""
    for path, module in model.named_modules():
        for name, rounding in _roundings(module).items():
            rounding.dtype = dtype_of(f"{path}.{name}")


def _roundings(module: nn.Module) -> dict[str, AsStored]:
    """The parametrizations of this kind of a module, by the name of the parameter."""
    if not parametrize.is_parametrized(module):
        return {}
    lists: Any = module.parametrizations
    return {name: one[0] for name, one in lists.items() if isinstance(one[0], AsStored)}
