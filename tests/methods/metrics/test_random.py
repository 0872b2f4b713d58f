"""Random scores follow seed and layer."""

from __future__ import annotations

import torch
from layer_statistics import by_hand

from moe_lab.methods.metrics.random import random
from moe_lab.profile.layer import LayerStatistics
from moe_lab.types import LayerInfo


def test_random_depends_on_seed_and_layer_only() -> None:
    layer, other = by_hand(), LayerStatistics(LayerInfo(4, "x", 4, 2, 2))
    assert torch.equal(random(layer, seed=1), random(layer, seed=1))
    assert not torch.equal(random(layer, seed=1), random(layer, seed=2))
    assert not torch.equal(random(layer, seed=1), random(other, seed=1))
