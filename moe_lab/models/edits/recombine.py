"""Some experts stay, and take in what is like theirs of the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_lab.models.edits.base import EditOfExperts
from moe_lab.types import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from moe_lab.models.layers import Standing


@dataclass(frozen=True)
class RecombineExperts(EditOfExperts):
    """The `kept` experts stay, and each hidden unit of the others joins one that is like it.

    DERN (2509.10377), from the weights alone (`models/segments.py`): units whose most similar one
    has a cosine above `threshold` join its expert, which is as wide as before when the units that
    it then has are averaged into clusters; the others go, and all router rows of experts that do
    not stay. scores: one for each expert, by which its units are weighed; none: all alike.
    """

    threshold: float = 0.6
    scores: tuple[float, ...] = ()

    kind = "recombine"
    gone = "recombined into others"

    @property
    def title(self) -> str:
        """With the threshold."""
        return f"recombine (above {self.threshold:g})"

    def restructure(self, standing: Standing, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Refuse experts of different widths: their segments are not as many."""
        from moe_lab.models.widths import is_uneven

        layer = self.own_layer(standing)
        if is_uneven(layer.experts):
            raise UserError(
                f"layer {self.index}: its experts have different numbers of hidden units, and DERN "
                "makes as many of each again: compress the model that it comes from, or ask for "
                "method=prune or method=merge"
            )
        return super().restructure(standing, tensors)

    def apply(self, standing: Standing, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Let the units join, then take the other experts out."""
        from moe_lab.models.segments import recombine

        layer = self.own_layer(standing)
        weights = self.scores or (1.0,) * layer.info.num_experts
        recombine(layer.experts, self.kept, weights, self.threshold)
        return self.restructure(standing, tensors)
