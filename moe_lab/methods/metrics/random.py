"""The random baseline."""

import torch

from moe_lab.methods.metrics.base import from_routers
from moe_lab.profile.layer import LayerStatistics


@from_routers
def random(layer: LayerStatistics, seed: int) -> torch.Tensor:
    """Uniform random scores [E] in [0, 1), drawn anew for each seed and layer."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + layer.info.index)
    return torch.rand(layer.info.num_experts, generator=generator, dtype=torch.float64)
