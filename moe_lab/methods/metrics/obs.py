"""OBS: hidden units removed one after another, those that stay refitted each time."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from moe_lab.methods import second_order
from moe_lab.methods.metrics.base import Metric
from moe_lab.option import Option
from moe_lab.profile.grams import TOKEN_WEIGHTS, GramCost, Grams
from moe_lab.profile.layer import LayerStatistics
from moe_lab.profile.profile import Profile
from moe_lab.progress import progress
from moe_lab.types import LayerInfo, UserError

logger = logging.getLogger(__name__)
GRAMS = ("auto", "joint", "expert")


@dataclass(frozen=True)
class Obs(Metric):
    """Optimal Brain Surgeon on the hidden units of experts, with the closed-form refit. Ours.

    The formulas of OBS (Hassibi and Stork 1993), OBC (2208.11580) and ZipLM (2302.04089) on the
    routed output of a layer, router's weights inside: `methods/second_order.py`. Always the unit
    goes next without which the output, refitted by what stays, changes least; by_layer one of each
    expert in a round, by_expert the cheapest anywhere. The score of a unit is the relative error of
    the layer's output once it has gone, the ridge's pull to the old columns counted: the order is
    nested, and any number of units can stay. With refit the plan has the down projections of what
    stays, else it is the choice alone.

    gram: joint, one problem for all experts of a layer, which knows that what one expert loses
    another one can give to the tokens that both get; expert, a problem for each, as if no token
    had two; auto: joint where it fits into joint_gib. Shared experts stay as they are; where they
    get narrower, too (method.shared), their units go by energy.
    """

    gram: Annotated[str, Option("the units that are refitted together", among=GRAMS)] = "auto"
    joint_gib: Annotated[float, Option("memory for the units of a layer together", above=0)] = 4.0
    ridge: Annotated[
        float, Option("pull to the old columns, of the mean of the Gram's diagonal", least=0)
    ] = 0.1
    token_weight: Annotated[
        str,
        Option("what a token weighs: 1 / the mean square of its state, or 1", among=TOKEN_WEIGHTS),
    ] = "output"
    refit: Annotated[bool, Option("new down projections for what stays; else the choice alone")] = (
        True
    )
    num_samples: Annotated[
        int | None, Option("first documents of the calibration set; null: all", least=1)
    ] = None

    needs_model = True

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse units of a layer together where they do not fit."""
        super().check(layers)
        for cost in (GramCost(info, joint=True) for info in layers if self.gram == "joint"):
            if (need := cost.working_bytes / 2**30) > self.joint_gib:
                raise UserError(
                    f"metric.gram=joint: the {cost.units} hidden units of layer {cost.info.index} "
                    f"together need {need:.2f} GiB, and metric.joint_gib={self.joint_gib:g}: "
                    f"metric.gram=expert, or metric.joint_gib={need + 0.01:.2f}"
                )

    def _cost(self, info: LayerInfo) -> GramCost:
        """Of the layer, its units refitted together or by expert."""
        together = GramCost(info, joint=True)
        fits = together.working_bytes <= self.joint_gib * 2**30
        return together if self.gram == "joint" or (self.gram == "auto" and fits) else (
            GramCost(info, joint=False)
        )  # fmt: skip

    def neuron_scores(self, profile: Profile) -> list[Tensor]:
        """For each layer in order, all experts of a layer losing the same number."""
        return self.ranked_neuron_scores(profile, "by_layer")

    def ranked_neuron_scores(self, profile: Profile, widths: str) -> list[Tensor]:
        """For each layer in order, of units that are ranked so."""
        self._say_cost(profile.statistics)
        grams = Grams(profile, self.num_samples, self.token_weight)
        layers = progress([layer.info for layer in profile.statistics], "obs")
        return [self._scores(profile, grams, info, widths == "by_layer") for info in layers]

    def shared_neuron_scores(self, profile: Profile) -> list[Tensor]:
        """The energy of the shared experts' units, which no refit touches."""
        shared = [layer.shared() for layer in profile.statistics]
        return [(one["gate_hidden_square_sum"] * one["down_square_sum"])[0] for one in shared]

    def refits(self, profile: Profile, kept: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """New down projections [E, D, W] of what stays, by layer index."""
        if not self.refit:
            return {}
        grams = Grams(profile, self.num_samples, self.token_weight)
        infos = {layer.info.index: layer.info for layer in profile.statistics}
        return {
            index: refit_of(
                grams.of(index, self._cost(infos[index]).joint), grams.columns(index),
                kept[index], self.ridge,
            )
            for index in progress(sorted(kept), "refit")
        }  # fmt: skip

    def _scores(self, profile: Profile, grams: Grams, info: LayerInfo, evenly: bool) -> Tensor:
        joint = self._cost(info).joint
        question = {
            "question": "obs", "layer": info.index, "evenly": evenly, "joint": joint,
            "ridge": self.ridge, "token_weight": self.token_weight,
            "num_samples": self.num_samples,
        }  # fmt: skip

        def work() -> list[list[float]]:
            gram = grams.of(info.index, joint)
            return scores_of(gram, grams.columns(info.index), self.ridge, evenly).tolist()

        rows = profile.remember(question, work, [Obs])
        return torch.tensor(rows, dtype=torch.float64)

    def _say_cost(self, layers: Sequence[LayerStatistics]) -> None:
        costs = [self._cost(layer.info) for layer in layers]
        products = sum(
            cost.products(float(layer["tokens"]), float(layer["count"].sum()))
            for cost, layer in zip(costs, layers, strict=True)
        )
        logger.info(
            "obs: units refitted together in %d of %d layers, by expert in the others: up to "
            "%.2f GiB in memory, %.2f GiB into the store, up to %.2g multiplications",
            sum(cost.joint for cost in costs), len(costs),
            max(cost.working_bytes for cost in costs) / 2**30,
            sum(cost.stored_bytes for cost in costs) / 2**30, products,
        )  # fmt: skip


def scores_of(gram: Tensor, columns_EID: Tensor, ridge: float, evenly: bool) -> Tensor:
    """The loss of a layer once each unit has gone, of its output's energy, [E, I], float64.

    gram: joint [E I, E I], or of each expert [E, I, I]; evenly: all experts lose the same number.
    """
    num_experts, width, _ = columns_EID.shape
    if gram.dim() == 2:
        columns_ND = columns_EID.flatten(0, 1)
        expert_N = torch.arange(len(gram)) // width if evenly else None
        found = second_order.one_by_one(gram, columns_ND, ridge, expert_N)
        place_N, cost_N = found.unit_N, found.cost_N
        whole = _energy(gram, columns_ND)
    else:
        pairs = list(zip(gram, columns_EID, strict=True))
        each = [second_order.one_by_one(one, columns_ID, ridge) for one, columns_ID in pairs]
        expert_N, unit_N, cost_N = second_order.in_turn(each, evenly)
        place_N = expert_N * width + unit_N
        whole = sum(_energy(one, columns_ID) for one, columns_ID in pairs)
    score_N = torch.empty(num_experts * width, dtype=torch.float64)
    score_N[place_N] = second_order.rising(cost_N, whole)
    return score_N.view(num_experts, width)


def _energy(gram_NN: Tensor, columns_ND: Tensor) -> float:
    """sum over tokens of w_t ||W z||^2."""
    columns_ND = columns_ND.double()
    return float(((gram_NN.double() @ columns_ND) * columns_ND).sum())


def refit_of(gram: Tensor, columns_EID: Tensor, kept_EI: Tensor, ridge: float) -> Tensor:
    """The down projections [E, D, W] of the kept units ([E, I] bool), zeros behind the last."""
    if gram.dim() == 2:
        columns_ND = columns_EID.flatten(0, 1)
        new_EID = second_order.refitted(gram, columns_ND, kept_EI.flatten(), ridge)
        new_EID = new_EID.view_as(columns_EID)
    else:
        parts = zip(gram, columns_EID, kept_EI, strict=True)
        new_EID = torch.stack([second_order.refitted(*part, ridge) for part in parts])
    widest = int(kept_EI.sum(dim=1).max())
    made_EWD = new_EID.new_zeros(len(kept_EI), widest, columns_EID.shape[2])
    for made_WD, new_ID, kept_I in zip(made_EWD, new_EID, kept_EI, strict=True):
        made_WD[: int(kept_I.sum())] = new_ID[kept_I]
    return made_EWD.transpose(1, 2).contiguous().float()
