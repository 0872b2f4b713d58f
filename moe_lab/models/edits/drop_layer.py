"""The MoE block adds nothing any more; attention and residual stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_lab.models.edits.base import Edit

if TYPE_CHECKING:
    from torch import Tensor, nn

    from moe_lab.models.layers import Standing


@dataclass(frozen=True)
class DropLayer(Edit):
    """Layer Drop (He et al., 2406.02500). scores: one of the layer; the notes say of what."""

    scores: tuple[float, ...] = ()

    kind = "drop_layer"
    leaves_moe = False
    drops_layer = True

    def restructure(self, standing: Standing, tensors: Mapping[str, Tensor]) -> nn.Module:
        """A block of zeros."""
        from moe_lab.models.editing import no_mlp

        return no_mlp(self.moe_layer(standing))
