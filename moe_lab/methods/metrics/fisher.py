"""Fisher-MoE: the Fisher information of a mask on each hidden unit."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moe_lab.methods.metrics.by_gradient import ByGradient
from moe_lab.profile.profile import Profile


@dataclass(frozen=True)
class Fisher(ByGradient):
    """Squared gradient of a document's loss at a mask m_c = 1 of each hidden unit [E, I].

    Fisher-MoE ("Less is MoE", 2606.05538) removes within each expert what has the least empirical
    Fisher information. Its exact formula was not to be had; ours is the natural reading:
    S_ec = mean over documents of (sum_t a_tc (u_t . w_c))^2, t over the document's tokens routed to
    expert e, since dL/dm_c = sum_t a_tc dL/da_tc and dL/da_tc = u_t . w_c; a, u, w as of
    metric=heapr. The loss is the mean over all positions of the calibration set, of which a
    document's part is squared. Shared experts are left as they are; sampled labels are ours.
    """

    widths = "by_layer"

    def neuron_scores(self, profile: Profile) -> list[Tensor]:
        """A score [E, I] for each layer in order."""
        return [layer.product_square_mean for layer in self.gradients(profile)]
