"""MergeMoE: what merged experts compute is fitted to what their members did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_lab.methods.grouping.base import Grouping, Groups, MergeCandidates, grouped, router_groups
from moe_lab.methods.least_squares import NormalEquations, TokenRows, solved
from moe_lab.methods.metrics.frequency import frequency
from moe_lab.methods.ratios import budget
from moe_lab.methods.ridge import Ridge
from moe_lab.models.experts import expert_hidden, expert_parameters
from moe_lab.models.hidden_units import HiddenUnits
from moe_lab.profile.all_experts import AllExperts
from moe_lab.profile.layer import LayerStatistics

PSEUDO_INVERSE = Ridge(0.0)  # raised to where rounding does not decide


@torch.no_grad()
def up_cosine(experts: AllExperts) -> Tensor:
    """Cosine [E, E] of the experts' up and gate projections, each pair as one vector."""
    units = HiddenUnits(experts.layer.experts)
    rows = []
    for expert in range(experts.info.num_experts):
        parts = units.parts(expert)
        ups = [parts[name].flatten() for name in parts if name != units.down and "bias" not in name]
        rows.append(F.normalize(torch.cat(ups).double(), dim=0))
    unit_EF = torch.stack(rows)
    return (unit_EF @ unit_EF.T).cpu()


@dataclass(frozen=True)
class MergeMoE(Grouping):
    """MergeMoE (2510.14436): the most used experts are centres; every other one joins the centre
    with the most similar [W_up; W_gate]. With f_i a member's share of its cluster's use, up and
    gate projections are averaged with f, and the down projection is

        W' = [f_1 W_1 ... f_n W_n] Q P^+,

    P what the hidden units of the averaged expert compute on the calibration tokens, Q those of all
    members: the least squares of the members' weighted output on the merged hidden units.

    What the paper, as far as we know it, does not say, and what is done here: similar is the cosine
    of the two projections as one vector; the tokens are all of the sample (method.num_samples),
    routed to the cluster or not, and weigh alike; all router rows stay and lead to the merged
    expert (router=all), which gets the sum of its members' weights; layers are measured on the
    intact model; ties go to the lower expert. P^+ is the limit of a ridge of 1e-10 of the mean
    diagonal: it is finite where there are fewer tokens than hidden units.
    """

    align = "none"
    needs_outputs = True
    outputs_options = ()
    refits = True
    scored_by = "frequency"

    def scores(self, statistics: LayerStatistics) -> Tensor:
        """How often each expert is used [E]."""
        return frequency(statistics)

    def outputs(self, experts: AllExperts) -> Tensor:
        """The cosines [E, E] of the up and gate projections."""
        return up_cosine(experts)

    def choose(self, candidates: MergeCandidates) -> Groups:
        """The most used experts, and to each those whose projections are most like its own."""
        info, count = candidates.statistics.info, frequency(candidates.statistics)
        centres = budget.best(info, count, candidates.number)
        cosine_EE = cast(Tensor, candidates.outputs_EE)  # given: it needs outputs
        groups = {centre: [centre] for centre in centres}
        for experts in router_groups(info):
            near = [centre for centre in centres if centre in experts]
            for expert in (expert for expert in experts if expert not in centres):
                groups[near[int(cosine_EE[expert, near].argmax())]].append(expert)
        return grouped(info, count, groups.values(), count)

    @torch.no_grad()
    def down_projections(self, experts: AllExperts, groups: Groups) -> Tensor:
        """The new down projections [E', D, I] of the experts that stay."""
        columns_EID = HiddenUnits(experts.layer.experts).down_columns()[list(groups.kept)].clone()
        for place, (members, shares) in enumerate(zip(groups.groups, groups.weights, strict=True)):
            if len(members) > 1:
                columns_EID[place] = merged_columns(experts, members, shares)
        return columns_EID.transpose(1, 2).float().contiguous()


@torch.no_grad()
def merged_columns(experts: AllExperts, members: Sequence[int], shares: Sequence[float]) -> Tensor:
    """The columns [I, D] with which the average of some experts is nearest to their mean output."""
    module = experts.layer.experts
    every = expert_parameters(module)
    up = _mean([{k: v for k, v in every[one].items() if "up" in k} for one in members], shares)
    bias = _mean([{k: v for k, v in every[one].items() if k == "down_bias"} for one in members],
                 shares)  # fmt: skip
    equations = None
    for chunk in experts.chunks():
        h_TI = expert_hidden(module, up, chunk.x_TD).float()
        y_TD = sum(
            (share * chunk.outputs_ETD[one].double()).float()
            for one, share in zip(members, shares, strict=True)
        )
        y_TD = cast(Tensor, y_TD) - (bias["down_bias"].float() if bias else 0.0)
        size = h_TI.shape[1], y_TD.shape[1]
        equations = equations or NormalEquations(*size, h_TI.device)
        equations.add(TokenRows(h_TI, y_TD, torch.ones_like(h_TI[:, 0])))
    assert equations is not None
    return solved(equations, torch.zeros_like(equations.cross_ND), PSEUDO_INVERSE)


def _mean(parts: Sequence[dict[str, Tensor]], shares: Sequence[float]) -> dict[str, Tensor]:
    """Tensors by name, averaged in float64 as `merge_experts` averages them."""
    return {
        name: torch.stack(
            [share * one[name].double() for one, share in zip(parts, shares, strict=True)]
        ).sum(dim=0).to(tensor.dtype)
        for name, tensor in parts[0].items()
    }  # fmt: skip
