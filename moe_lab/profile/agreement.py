"""How the hidden units of an expert agree with what it gives, and that with what it gets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_lab.models.hidden_units import HiddenUnits
from moe_lab.profile.hidden import HiddenStates, hidden_by_expert
from moe_lab.profile.profile import Profile
from moe_lab.progress import progress
from moe_lab.types import Routing


@dataclass(frozen=True)
class Agreement:
    """Sums of one MoE layer over the tokens routed to each expert, float64.

    With an expert's input x, its output f before the router's weight g, a unit's activation a and
    its column w: count [E], tokens; projection_sum [E, I], of <a w, f> / ||f||, a unit's part along
    its expert's output; turn_sum [E], of g ||f|| (1 - cos(x, f)).
    """

    count: Tensor
    projection_sum: Tensor
    turn_sum: Tensor


def agreements(profile: Profile, num_samples: int | None) -> list[Agreement]:
    """Those of every MoE layer in order, on the first so many samples (None: all of them).

    One forward pass gives all of them, and is remembered.
    """

    def work() -> dict[int, dict[str, Tensor]]:
        states = HiddenStates(profile.open_stream(num_samples))
        return {
            index: _sums(states, index)
            for index in progress(sorted(states.stream.moe), "agreement")
        }

    question = {"question": "agreement of neurons", "num_samples": num_samples}
    return [Agreement(**one) for one in profile.by_layer(question, work, [agreements])]


@torch.no_grad()
def _sums(states: HiddenStates, index: int) -> dict[str, Tensor]:
    info = states.stream.moe[index].info
    of_expert, of_unit = info.num_experts, (info.num_experts, info.expert_width)
    sums = {
        "count": torch.zeros(of_expert, dtype=torch.float64),
        "projection_sum": torch.zeros(of_unit, dtype=torch.float64),
        "turn_sum": torch.zeros(of_expert, dtype=torch.float64),
    }
    for routing in states.routings(index):
        columns_EID = HiddenUnits(states.stream.moe[index].experts).down_columns()
        counts = torch.bincount(routing.expert_S, minlength=info.num_experts)
        sums = {name: total.to(counts.device) for name, total in sums.items()}
        sums["count"] += counts
        sums["turn_sum"] += _turns(routing, counts)
        split = routing.y_SD.split(counts.tolist())
        for expert, h_NI, _, _ in hidden_by_expert(routing, info.num_experts):
            exact = torch.promote_types(h_NI.dtype, torch.float32)
            along_ND = F.normalize(split[expert].to(exact), dim=-1)
            along_NI = h_NI.to(exact) * (along_ND @ columns_EID[expert].to(exact).T)
            sums["projection_sum"][expert] += along_NI.sum(dim=0, dtype=torch.float64)
    return {name: total.cpu() for name, total in sums.items()}


def _turns(routing: Routing, counts: Tensor) -> Tensor:
    """The sum [E] of g ||f|| (1 - cos(x, f)) of one batch."""
    exact = torch.promote_types(routing.y_SD.dtype, torch.float32)
    x_SD, y_SD = routing.x_TD[routing.token_S].to(exact), routing.y_SD.to(exact)
    turn_S = (1 - F.cosine_similarity(x_SD, y_SD, dim=-1)) * y_SD.norm(dim=-1)
    gated_S = (turn_S * routing.weight_S.to(exact)).double()
    sum_E = torch.zeros(len(counts), dtype=torch.float64, device=gated_S.device)
    return sum_E.index_add_(0, routing.expert_S, gated_S)
