"""The random baseline, of experts or of neurons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from moe_lab.methods.metrics.base import Metric, from_routers
from moe_lab.option import Option
from moe_lab.profile.layer import LayerStatistics


@dataclass(frozen=True)
class Random(Metric):
    """Uniform random scores in [0, 1), drawn anew for each seed and layer."""

    seed: Annotated[int, Option("seed of what is drawn")]

    from_routers = True

    def score(self, layer: LayerStatistics) -> Tensor:
        """Drawn for each expert [E]."""
        return random(layer, self.seed)

    def neuron_score(self, layer: LayerStatistics) -> Tensor:
        """Drawn for each hidden unit [E, I]."""
        return _drawn(layer, self.seed, layer.info.num_experts, layer.info.expert_width)


@from_routers
def random(layer: LayerStatistics, seed: int) -> Tensor:
    """Uniform random scores [E] in [0, 1), drawn anew for each seed and layer."""
    return _drawn(layer, seed, layer.info.num_experts)


def _drawn(layer: LayerStatistics, seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + layer.info.index)
    return torch.rand(*shape, generator=generator, dtype=torch.float64)
