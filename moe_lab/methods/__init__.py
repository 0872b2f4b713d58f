"""Methods: from statistics to a plan that says what happens to each layer.

A method has `check(layers)`, which refuses an impossible request before any work, and
`plan(evidence)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from moe_lab.statistics import LayerStatistics


@dataclass(frozen=True)
class Evidence:
    """What a method may look at. model and batches are made only when a method asks for them.

    batches: the calibration set as input_ids and attention_mask [B, L].
    """

    statistics: list[LayerStatistics]
    model: Callable[[], nn.Module]
    batches: Callable[[], list[dict[str, Tensor]]]
