"""Layers with scores of hidden units, as ratios see them."""

from __future__ import annotations

import torch
from layer_scores import sized
from torch import Tensor

from moe_lab.methods.ratios.neurons import Neurons, foreseen_neurons


def pool(index: int, num_experts: int, width: int, widths: str = "by_expert") -> Neurons:
    """A layer of so many experts, each so wide."""
    info = sized(
        index, num_experts, expert_width=width, neuron_parameters=1, neuron_bytes=2,
        model_bytes=100_000, model_parameters=50_000,
    )  # fmt: skip
    return foreseen_neurons(info, widths)


def scored_pools(*shapes: tuple[int, int], seed: int = 0) -> list[tuple[Neurons, Tensor]]:
    """Layers of (experts, width) with random scores, of other sizes in each layer and expert."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index, (experts, width) in enumerate(shapes):
        score_EI = torch.rand(experts, width, generator=generator, dtype=torch.float64) ** 4
        size_E1 = 10 ** (4 * torch.rand(experts, 1, generator=generator, dtype=torch.float64))
        found.append((pool(index, experts, width), score_EI * size_E1 * 100.0**index))
    return found
