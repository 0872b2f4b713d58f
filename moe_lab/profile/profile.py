"""What a method, a metric and a ratio may look at before they decide."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from moe_lab.models.stream import LayerStream
from moe_lab.profile.layer import LayerStatistics


def _always_anew(identity: dict[str, Any], work: Callable[[], Any], code: Sequence[Any]) -> Any:
    return work()


def _no_model(num_samples: int | None = None) -> Any:
    raise RuntimeError("this profile has statistics alone")


@dataclass(frozen=True)
class Profile:
    """Statistics of the intact model, and what costs more, made only when somebody asks.

    open_stream(num_samples): the model's decoder layers over the first so many samples of the
    calibration set (None: all of it). open_model(num_samples): the intact model, whole, and those
    samples as batches (input_ids, attention_mask [B, L]). remember(identity, work, code): what
    `work` (plain JSON values) gave for the same identity, model, data and code before; code: the
    modules that its answer depends on.
    """

    statistics: list[LayerStatistics]
    open_stream: Callable[..., LayerStream] = _no_model
    open_model: Callable[..., tuple[nn.Module, list[dict[str, Tensor]]]] = _no_model
    remember: Callable[[dict[str, Any], Callable[[], Any], Sequence[Any]], Any] = _always_anew
