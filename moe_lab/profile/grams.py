"""Gram matrices of what the hidden units of a layer's experts add, over the calibration text.

Hidden unit c of expert e adds z_ec w_ec to a token, w_ec its column of the down projection, z_ec =
g_e a_ec its activation times the router's weight, 0 where the token does not choose the expert. A
bias of the down projection is no part of that. The Gram matrix is G = sum over tokens of w_t z z^T:
jointly over all units of a layer [E I, E I], or of each expert by itself [E, I, I].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_lab.models.hidden_units import HiddenUnits
from moe_lab.models.stream import LayerStream
from moe_lab.profile.hidden import HiddenStates, hidden_by_expert
from moe_lab.profile.profile import Profile
from moe_lab.types import LayerInfo, NotFinite, Routing, UserError

TOKEN_WEIGHTS = ("output", "none")
TOKENS_SIDE_BY_SIDE = 1024  # whose hidden units of all experts lie side by side at a time


class Grams:
    """Gram matrices and columns of the MoE layers of an intact model, a layer at a time.

    Layers come in ascending order, and what was asked before is remembered. token_weight: output,
    each token weighs 1 / mean square of the state [D] that leaves its decoder layer, so that what
    counts is the relative error of that state, whose size differs a thousandfold among tokens;
    none, all tokens weigh alike.
    """

    def __init__(self, profile: Profile, num_samples: int | None, token_weight: str):
        self.profile, self.num_samples, self.token_weight = profile, num_samples, token_weight
        self._states: HiddenStates | None = None
        self._stream: LayerStream | None = None
        check_token_weight(profile, token_weight, "metric.token_weight")

    def of(self, index: int, joint: bool) -> Tensor:
        """The Gram matrix [E I, E I] (joint) or matrices [E, I, I] of one layer, float32."""
        question = {
            "question": "gram", "layer": index, "joint": joint,
            "token_weight": self.token_weight, "num_samples": self.num_samples,
        }  # fmt: skip

        def work() -> dict[str, Tensor]:
            return {"gram": self._measured(index, joint).float()}

        return self.profile.remember_tensors(question, work, [Grams])["gram"]

    def columns(self, index: int) -> Tensor:
        """The columns of the down projections of one layer [E, I, D], float32 or better."""
        stream = self._stream = self._stream or self.profile.open_stream(1)
        with stream.layer(index):
            columns_EID = HiddenUnits(stream.moe[index].experts).down_columns().detach()
            exact = torch.promote_types(columns_EID.dtype, torch.float32)
            return columns_EID.to("cpu", exact, copy=True)

    def _measured(self, index: int, joint: bool) -> Tensor:
        if self._states is None:
            self._stream = self.profile.open_stream(self.num_samples)
            self._states = HiddenStates(self._stream)
        info = self._states.stream.moe[index].info
        experts, width = info.num_experts, info.expert_width
        shape = (experts * width,) * 2 if joint else (experts, width, width)
        total = torch.zeros(shape, dtype=torch.float64, device=self._states.stream.valid[0].device)
        for routing in self._states.routings(index):
            weight_T = token_weights(routing, self.token_weight)
            (add_joint if joint else add_by_expert)(total, routing, weight_T)
        if not bool(total.isfinite().all()):
            raise NotFinite(f"layer {index}: products of its hidden units are not finite", index)
        return total.cpu()


def check_token_weight(profile: Profile, token_weight: str, option: str) -> None:
    """Refuse what cannot be weighed in one of its layers; option: as users name it."""
    for layer in profile.statistics if token_weight == "output" else ():
        if not layer.has_cosine("layer"):
            raise UserError(
                f"{option}=output weighs tokens by the state that leaves a layer, "
                f"and around layer {layer.info.index} there is not one hidden state for each "
                f"token ({layer.info.family}): {option}=none"
            )


def token_weights(routing: Routing, kind: str) -> Tensor:
    """What each token of a batch weighs in the sums [T], in float32 or better."""
    if kind == "none":
        return weights_of_states(routing.x_TD, kind)
    assert routing.leaving_TD is not None  # `Grams` has refused such layers
    return weights_of_states(routing.leaving_TD, kind)


def weights_of_states(leaving_TD: Tensor, kind: str) -> Tensor:
    """The same by the states that leave the decoder layer; kind: one of TOKEN_WEIGHTS."""
    exact = torch.promote_types(leaving_TD.dtype, torch.float32)
    if kind == "none":
        return torch.ones(len(leaving_TD), dtype=exact, device=leaving_TD.device)
    square_T = leaving_TD.to(exact).square().mean(dim=1)
    return torch.where(square_T > 0, 1 / square_T, 0.0)


def add_joint(total_NN: Tensor, routing: Routing, weight_T: Tensor) -> None:
    """Add a batch to the Gram matrix of all experts together, products in float32."""
    assert routing.hidden_SI is not None
    width = routing.hidden_SI.shape[1]
    num_experts = len(total_NN) // width
    share_S = routing.weight_S.to(weight_T) * weight_T.sqrt()[routing.token_S]
    for start in range(0, len(weight_T), TOKENS_SIDE_BY_SIDE):
        number = min(TOKENS_SIDE_BY_SIDE, len(weight_T) - start)
        rows = ((routing.token_S >= start) & (routing.token_S < start + number)).nonzero()[:, 0]
        z_TEI = weight_T.new_zeros(number, num_experts, width)
        z_RI = routing.hidden_SI[rows].to(weight_T) * share_S[rows, None]
        z_TEI[routing.token_S[rows] - start, routing.expert_S[rows]] = z_RI
        z_TN = z_TEI.flatten(1)
        total_NN += z_TN.T @ z_TN


def add_by_expert(total_EII: Tensor, routing: Routing, weight_T: Tensor) -> None:
    """Add a batch to the Gram matrices of each expert, products in float32."""
    for expert, h_NI, gate_N, token_N in hidden_by_expert(routing, len(total_EII)):
        z_NI = h_NI.to(weight_T) * (gate_N.to(weight_T) * weight_T.sqrt()[token_N])[:, None]
        for part_NI in z_NI.split(TOKENS_SIDE_BY_SIDE):
            total_EII[expert] += part_NI.T @ part_NI


@dataclass(frozen=True)
class GramCost:
    """What the Gram matrices of one layer cost; joint: one of all its units together."""

    info: LayerInfo
    joint: bool

    @property
    def units(self) -> int:
        """How many hidden units a matrix is of."""
        width = self.info.expert_width
        return self.info.num_experts * width if self.joint else width

    @property
    def matrices(self) -> int:
        """How many there are."""
        return 1 if self.joint else self.info.num_experts

    @property
    def stored_bytes(self) -> int:
        """In float32, as they are remembered."""
        return 4 * self.matrices * self.units**2

    @property
    def working_bytes(self) -> int:
        """In float64 as they are summed, and four more for what is done with one of them."""
        return 8 * (self.matrices + 4) * self.units**2

    def products(self, num_tokens: float, num_pairs: float) -> float:
        """Multiplications for the sums, and for going through all units with three matrices.

        num_pairs: of tokens and the experts that they choose.
        """
        rows = num_tokens if self.joint else num_pairs
        return rows * self.units**2 + 3 * self.matrices * self.units**3
