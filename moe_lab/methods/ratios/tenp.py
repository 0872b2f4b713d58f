"""TENP's widths: the best experts stay whole, the others share what is left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from moe_lab.methods.ratios.neurons import Neurons
from moe_lab.methods.ratios.widths import WidthBudget
from moe_lab.option import Option
from moe_lab.profile.agreement import agreements
from moe_lab.profile.profile import Profile
from moe_lab.types import LayerInfo, UserError


@dataclass(frozen=True)
class Tenp(WidthBudget):
    """The experts that turn their tokens most stay whole; all others of a layer get one width.

    TENP (2606.09885, second hand; there is no code): an expert's score is sum_t g ||f|| (1 - cos(x,
    f)) over the tokens routed to it, x its input, f its output, g the router's weight; the top
    experts keep their full width (20 to 30 % of them where 40 % goes, 5 % where 70 % goes), fewer
    in shallow layers and more in deep ones, a trapezoid. Its scores are normalised by domain, and
    the domains' added up; here the calibration set is one domain, and their order is the same.

    Ours: each layer has the same budget; the trapezoid is a line, from whole (1 - slope) of the
    first MoE layer's experts to whole (1 + slope) of the last one's; and what whole experts leave
    of a layer's budget the others share evenly, in multiples of round_to, the better ones first.
    """

    whole: Annotated[float, Option("share of experts that stay whole", least=0, most=1)] = 0.25
    slope: Annotated[
        float, Option("how many more of them in the last layer than in the middle", least=0, most=1)
    ] = 0.5
    num_samples: Annotated[
        int | None, Option("first calibration samples, null for all of them", least=1)
    ] = None

    takes_groups = False

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse whole experts that take more than there is."""
        super().check(layers)
        pools = [info for info in layers if isinstance(info, Neurons)]
        for pool, whole in zip(pools, self._whole_experts(pools), strict=True):
            left = self._room(pool, pools) - whole * pool.expert_width
            if left < self.least * (pool.experts - whole):
                raise UserError(
                    f"ratio.whole={self.whole} ratio.slope={self.slope}: layer {pool.index} would "
                    f"have {whole} whole experts of {pool.experts}, and the budget leaves "
                    f"{self._room(pool, pools) / pool.expert_width:.4g} experts' worth of hidden "
                    "units: ask for fewer whole experts, or remove less"
                )

    def kept(self, layers: Sequence[LayerInfo]) -> int:
        """How many hidden units all layers keep together."""
        pools = [info for info in layers if isinstance(info, Neurons)]
        pairs = zip(pools, self._whole_experts(pools), strict=True)
        return sum(int(self._of_layer(pool, whole, pools).sum()) for pool, whole in pairs)

    def widths(
        self, layers: Sequence[tuple[Neurons, Tensor]], profile: Profile
    ) -> dict[int, Tensor]:
        """How many hidden units each expert keeps [E], by layer index."""
        pools = [pool for pool, _ in layers]
        of_layers = zip(
            pools, self._whole_experts(pools), agreements(profile, self.num_samples), strict=True
        )
        found = {}
        for pool, whole, one in of_layers:
            order_E = one.turn_sum.argsort(descending=True, stable=True)
            found[pool.index] = torch.empty_like(order_E)
            found[pool.index][order_E] = self._of_layer(pool, whole, pools)
        return found

    def notes(self, scores: Any, numbers: Any) -> dict[str, Any]:
        """kept_per_layer; whole_experts: how many of each layer stay whole."""
        pools = [pool for pool, _ in scores]
        whole = zip(pools, self._whole_experts(pools), strict=True)
        told = {str(pool.index): number for pool, number in whole}
        return super().notes(scores, numbers) | {"whole_experts": told}

    def _room(self, pool: Neurons, pools: Sequence[Neurons]) -> int:
        """How many hidden units a layer may keep."""
        return max(0, self.stays(pool.num_experts, 1, pools))

    def _whole_experts(self, pools: Sequence[Neurons]) -> list[int]:
        """How many experts of each layer stay whole."""
        line = torch.linspace(1 - self.slope, 1 + self.slope, len(pools)).tolist()
        if len(pools) == 1:
            line = [1.0]
        shares = (min(1.0, self.whole * at) for at in line)
        return [round(share * pool.experts) for share, pool in zip(shares, pools, strict=True)]

    def _of_layer(self, pool: Neurons, whole: int, pools: Sequence[Neurons]) -> Tensor:
        """The widths [E] of a layer's experts, the best expert's first."""
        room, others = self._room(pool, pools), pool.experts - whole
        width_E = torch.full((pool.experts,), pool.expert_width)
        if others:
            blocks = (room - whole * pool.expert_width) // self.round_to
            even, more = divmod(blocks, others)
            width_E[whole:] = even * self.round_to
            width_E[whole : whole + more] += self.round_to
        return width_E.clamp(max=pool.expert_width)
