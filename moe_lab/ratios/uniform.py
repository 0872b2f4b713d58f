"""The same number of experts in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_lab.moe import check_kept
from moe_lab.types import LayerInfo, UserError


@dataclass(frozen=True)
class Uniform:
    """Remove the share `ratio` of the experts of each layer (rounded to whole experts)."""

    ratio: float

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse a ratio that leaves a router too few experts."""
        if not 0 <= self.ratio < 1:
            raise UserError(
                f"ratio.ratio={self.ratio}: the share of experts removed is at least 0, below 1"
            )
        for info in layers:
            try:
                check_kept(info, self._num_kept(info))
            except UserError as error:
                most = max(0.0, 1 - info.top_k / info.num_experts)
                raise UserError(
                    f"ratio.ratio={self.ratio} is too much: {error}. At most {most:.4g} can be "
                    "removed from this layer"
                ) from error

    def keep(self, scores: Sequence[tuple[LayerInfo, Tensor]]) -> dict[int, tuple[int, ...]]:
        """The experts that stay, in ascending order, by layer index; ties keep the lower expert.

        Group-limited routers keep the best of each group, the same number in every group.
        """
        kept = {}
        for info, score in scores:
            size = info.num_experts // info.groups
            per_group = self._num_kept(info) // info.groups
            chosen: list[int] = []
            for group in range(info.groups):
                part = score[group * size : (group + 1) * size]
                order = torch.argsort(part, descending=True, stable=True)[:per_group]
                chosen.extend(group * size + int(expert) for expert in order)
            kept[info.index] = tuple(sorted(chosen))
        return kept

    def _num_kept(self, info: LayerInfo) -> int:
        return info.num_experts - int(info.num_experts * self.ratio + 0.5)
