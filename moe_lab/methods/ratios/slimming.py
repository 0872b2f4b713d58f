"""MoE-Slimming's widths: each layer, and each expert of it, keeps the same share of its scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_lab.methods.ratios.neurons import Neurons
from moe_lab.methods.ratios.widths import WidthBudget, aligned_widths
from moe_lab.profile.profile import Profile


@dataclass(frozen=True)
class Slimming(WidthBudget):
    """Coverage: every layer keeps as few hidden units as have the same share of its scores.

    MoE-Slimming (2606.18304): one coverage level s between the layers, each keeping the smallest
    prefix of its sorted scores that sums to s of all; within a layer the same over its experts,
    with exactly the layer's number in the end; then widths are rounded down to multiples
    (round_to), spare blocks go to the largest remainders, and none is narrower than `floor` or
    wider than it was. Its code bisects s in 32 steps and repairs the rest by single units; here the
    level is found exactly, by the share that stands before each unit. Ours: what the multiples of a
    layer leave over goes to the next one; an expert without any score keeps `floor` units, or those
    that no other wants (its code gives it noise); weights of layers by their loss are left out.
    """

    def widths(
        self, layers: Sequence[tuple[Neurons, Tensor]], profile: Profile
    ) -> dict[int, Tensor]:
        """How many hidden units each expert keeps [E], by layer index."""
        number = self.total([pool for pool, _ in layers])
        every = [score_EI.double().clamp(min=0) for _, score_EI in layers]
        floors = [self.least * len(score_EI) for score_EI in every]
        rooms = covered([one.flatten() for one in every], floors, number)
        found, spare = {}, 0
        for (pool, _), score_EI, room in zip(layers, every, rooms, strict=True):
            wanted = min(room + spare, score_EI.numel())
            width_E = torch.tensor(covered(list(score_EI), [self.least] * len(score_EI), wanted))
            found[pool.index] = aligned_widths(width_E, score_EI.shape[1], self.round_to)
            spare += room - int(found[pool.index].sum())
        return found


def covered(scores: Sequence[Tensor], floors: Sequence[int], number: int) -> list[int]:
    """How many of each of some scores stay, `number` in all, each with the same share of its sum.

    floors: how many of each stay in any case. The units of each are in order of score; of a unit
    counts the share of the sum that stands before it: those with the lowest stay.
    """
    before, owner = [], []
    for place, (score_N, floor) in enumerate(zip(scores, floors, strict=True)):
        best_N = score_N.sort(descending=True).values
        total = best_N.sum()
        share_N = (best_N.cumsum(0) - best_N) / total if total > 0 else torch.ones_like(best_N)
        share_N[:floor] = -1.0
        before.append(share_N)
        owner.append(torch.full((len(score_N),), place))
    stays = torch.cat(before).argsort(stable=True)[:number]
    return torch.cat(owner)[stays].bincount(minlength=len(scores)).tolist()
