"""The random baseline."""

from typing import Annotated

import torch

from moe_lab.methods.metrics.base import from_routers
from moe_lab.option import Option
from moe_lab.profile.layer import LayerStatistics


@from_routers
def random(
    layer: LayerStatistics, seed: Annotated[int, Option("seed of what is drawn")]
) -> torch.Tensor:
    """Uniform random scores [E] in [0, 1), drawn anew for each seed and layer."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + layer.info.index)
    return torch.rand(layer.info.num_experts, generator=generator, dtype=torch.float64)
