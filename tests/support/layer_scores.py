"""Layers with scores, and how many experts a ratio keeps of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moe_lab.methods.ratios import budget
from moe_lab.methods.ratios.budget import Ratio, Scores
from moe_lab.profile.profile import Profile
from moe_lab.types import LayerInfo


def sized(index: int, num_experts: int = 8, **more: int) -> LayerInfo:
    """A layer of a model of 10,000 bytes (half as many parameters) with 100 bytes an expert."""
    values = {"top_k": 2, "hidden_size": 2, "expert_parameters": 50, "expert_bytes": 100}
    values |= {"model_parameters": 5_000, "model_bytes": 10_000}
    return LayerInfo(index, f"model.layers.{index}.mlp", num_experts, **(values | more))


def scored(layers: list[LayerInfo], seed: int = 0) -> list[tuple[LayerInfo, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(info, torch.rand(info.num_experts, generator=generator)) for info in layers]


def numbers(ratio: Any, layers: list[LayerInfo]) -> list[int]:
    ratio.check(layers)
    return list(ratio.numbers(scored(layers), Profile([])).values())


def layer(index: int, num_experts: int = 4, **more: int) -> LayerInfo:
    return LayerInfo(index, f"model.layers.{index}.mlp", num_experts, **({"top_k": 1} | more),
                     hidden_size=2)  # fmt: skip


def rows(*scores: list[float], **more: int) -> list[tuple[LayerInfo, torch.Tensor]]:
    return [
        (layer(index, len(row), **more), torch.tensor(row).double())
        for index, row in enumerate(scores, start=1)
    ]


def keep(ratio: Any, scores: Scores) -> dict[int, tuple[int, ...]]:
    """Which experts stay by a ratio that looks at nothing but the scores."""
    return budget.kept(scores, ratio.numbers(scores, Profile([])))


def notes(ratio: Any, scores: Scores) -> dict[str, Any]:
    return ratio.notes(scores, ratio.numbers(scores, Profile([])))


@dataclass(frozen=True)
class Listed(Ratio):
    """So many experts in each layer."""

    number: int

    def numbers(self, scores, profile) -> dict[int, int]:
        return {info.index: self.number for info, _ in scores}
