"""What goes into the matrices of each expert over the calibration text, as sums of products.

Of expert e, over the tokens that are routed to it: the inputs x of its gate and up projections, and
h of its down projection. Sums are in float64, and nothing is remembered: they are as large as a
layer's experts, or larger. Letters: see `types.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_lab.models.stream import LayerStream
from moe_lab.profile.grams import check_token_weight, token_weights
from moe_lab.profile.hidden import HiddenStates, hidden_by_expert
from moe_lab.profile.profile import Profile
from moe_lab.types import LayerInfo, NotFinite

TOKENS_PER_PRODUCT = 4096


@dataclass(frozen=True)
class Covariances:
    """Uncentred sums of one layer: inputs [E, D, D] of x x^T, hidden [E, I, I] of h h^T; count [E].

    Where the router's weights g count, each product times g^2: the layer's output has the error
    g W x of a changed W.
    """

    count: Tensor
    inputs: Tensor
    hidden: Tensor


class ExpertInputs:
    """The sums of the MoE layers of an intact model, each asked for once, in ascending order.

    num_samples: on the first so many samples (None: all); gated: whether router weights count;
    token_weight: what tokens weigh, as of `grams.Grams`.
    """

    def __init__(
        self,
        profile: Profile,
        num_samples: int | None,
        gated: bool = False,
        token_weight: str = "none",
    ):
        check_token_weight(profile, token_weight, "form.token_weight")
        self.stream: LayerStream = profile.open_stream(num_samples)
        self._states, self._gated = HiddenStates(self.stream), gated
        self._token_weight = token_weight

    def of(self, index: int) -> Covariances:
        """Those of one layer, on the CPU."""
        info = self.stream.moe[index].info
        sums = _nothing(info, self.stream.valid[0].device)
        for routing in self._states.routings(index):
            root_T = token_weights(routing, self._token_weight).double().sqrt()
            for expert, h_NI, gate_N, token_N in hidden_by_expert(routing, info.num_experts):
                weight_N = root_T[token_N] * (gate_N.double() if self._gated else 1.0)
                sums.count[expert] += len(h_NI)
                x_ND = routing.x_TD[token_N]
                for values, total in ((x_ND, sums.inputs), (h_NI, sums.hidden)):
                    _add(total[expert], values, weight_N)
        for total in (sums.inputs, sums.hidden):
            if not bool(total.isfinite().all()):
                raise NotFinite(f"layer {index}: products of its inputs are not finite", index)
        return Covariances(sums.count.cpu(), sums.inputs.cpu(), sums.hidden.cpu())


def _add(total_NN: Tensor, values_TN: Tensor, weight_T: Tensor) -> None:
    for value, weight in zip(
        values_TN.split(TOKENS_PER_PRODUCT), weight_T.split(TOKENS_PER_PRODUCT), strict=True
    ):
        weighted = value.double() * weight[:, None]
        total_NN.addmm_(weighted.T, weighted)


def _nothing(info: LayerInfo, device: torch.device) -> Covariances:
    number, size, width = info.num_experts, info.neuron_parameters // 3, info.expert_width
    shapes = (number,), (number, size, size), (number, width, width)
    return Covariances(
        *(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes)
    )
