"""HEAPr: how much the loss changes without a hidden unit, to the second order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_lab.methods.metrics.by_gradient import ByGradient
from moe_lab.profile.profile import Profile


@dataclass(frozen=True)
class Heapr(ByGradient):
    """Mean square of each hidden unit times the loss's Fisher information along its column [E, I].

    HEAPr (2509.22299): S_ec = (sum_t a_tc^2 / n_e) (w_c^T M_e w_c), M_e = sum_t u_t u_t^T / n_e,
    over the n_e tokens t routed to expert e; a_tc the unit's activation, w_c its column of the down
    projection, u_t the gradient of the loss at the expert's output, before the router's weight.
    M_e is never made: w_c^T M_e w_c = sum_t (u_t . w_c)^2 / n_e. As in its code an expert without
    tokens gets -1, and shared experts are left as they are; its own budget is ratio=global, over
    the experts of all layers together. Its labels are the text; sampled ones are ours: then M_e is
    the Fisher information that stands for the Hessian, and not the empirical one.
    """

    widths = "by_expert"

    def neuron_scores(self, profile: Profile) -> list[Tensor]:
        """A score [E, I] for each layer in order."""
        scores = []
        for layer in self.gradients(profile):
            count_E1 = layer.count[:, None].clamp(min=1)
            score_EI = layer.hidden_square_sum / count_E1 * (layer.gradient_square_sum / count_E1)
            scores.append(torch.where(layer.count[:, None] > 0, score_EI, -1.0))
        return scores
