"""Fisher-MoE: the Fisher information of a mask on each hidden unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from moe_lab.methods.metrics.by_gradient import ByGradient
from moe_lab.option import Option
from moe_lab.profile.profile import Profile

OVER = ("documents", "tokens")


@dataclass(frozen=True)
class Fisher(ByGradient):
    """Squared gradient of the loss at a mask m_c = 1 of each hidden unit [E, I].

    Fisher-MoE ("Less is MoE", 2606.05538) removes within each expert what has the least empirical
    Fisher information. Its exact formula was not to be had; ours is the natural reading:
    S_ec = sum over documents of (sum_t a_tc (u_t . w_c))^2, t over the document's tokens sent to
    expert e, since dL/dm_c = sum_t a_tc dL/da_tc and dL/da_tc = u_t . w_c; a, u, w as of
    metric=heapr. over=tokens squares each token's part: S_ec = sum_t (a_tc (u_t . w_c))^2.
    Shared experts are left as they are; sampled labels are ours.
    """

    over: Annotated[str, Option("whose gradient is squared", among=OVER)] = "documents"

    widths = "by_layer"

    def neuron_scores(self, profile: Profile) -> list[Tensor]:
        """A score [E, I] for each layer in order."""
        names = {"documents": "document_square_sum", "tokens": "product_square_sum"}
        return [getattr(layer, names[self.over]) for layer in self.gradients(profile)]
