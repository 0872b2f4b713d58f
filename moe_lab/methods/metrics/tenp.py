"""TENP: how much of its expert's output a hidden unit makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from moe_lab.methods.metrics.base import Metric
from moe_lab.option import Option
from moe_lab.profile.agreement import agreements
from moe_lab.profile.profile import Profile


@dataclass(frozen=True)
class Tenp(Metric):
    """Mean projection of a hidden unit's contribution on its expert's output [E, I].

    TENP (2606.09885): S_ec = mean_t <a_tc w_c, f_t> / ||f_t|| over the tokens t routed to expert e,
    f_t its output before the router's weight, a_tc the unit's activation and w_c its column of the
    down projection: units are ranked within their expert. Which experts stay whole and how wide the
    others stay is ratio=tenp. There is no code of it; the formula is second hand. An expert without
    tokens has scores of 0.
    """

    num_samples: Annotated[
        int | None, Option("first calibration samples, null for all of them", least=1)
    ] = None

    needs_model = True
    scores_shared = False
    widths = "by_layer"

    def neuron_scores(self, profile: Profile) -> list[Tensor]:
        """A score [E, I] for each layer in order."""
        found = agreements(profile, self.num_samples)
        return [one.projection_sum / one.count[:, None].clamp(min=1) for one in found]
