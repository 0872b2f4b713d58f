"""The same number of experts in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_lab.evidence import Evidence
from moe_lab.moe import check_kept
from moe_lab.ratios import Scores, check_share
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

    def numbers(self, scores: Scores, evidence: Evidence) -> dict[int, int]:
        """How many experts each layer keeps, by layer index."""
        return {info.index: self._num_kept(info) for info, _ in scores}

    def _num_kept(self, info: LayerInfo) -> int:
        return info.num_experts - int(info.num_experts * self.ratio + 0.5)
