"""The same number of experts in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_lab.moe import check_kept
from moe_lab.ratios import Scores, best, check_share
from moe_lab.types import LayerInfo, UserError


@dataclass(frozen=True)
class Uniform:
    """Remove the share `ratio` of the experts of each layer (rounded to whole experts)."""

    ratio: float

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse a ratio that leaves a router too few experts."""
        check_share(self.ratio)
        for info in layers:
            try:
                check_kept(info, self._num_kept(info))
            except UserError as error:
                most = max(0.0, 1 - info.top_k / info.num_experts)
                raise UserError(
                    f"ratio.ratio={self.ratio} is too much: {error}. At most {most:.4g} can be "
                    "removed from this layer"
                ) from error

    def keep(self, scores: Scores) -> dict[int, tuple[int, ...]]:
        """The experts that stay, in ascending order, by layer index; ties keep the lower expert.

        Group-limited routers keep the best of each group, the same number in every group.
        """
        return {info.index: best(info, score, self._num_kept(info)) for info, score in scores}

    def _num_kept(self, info: LayerInfo) -> int:
        return info.num_experts - int(info.num_experts * self.ratio + 0.5)
