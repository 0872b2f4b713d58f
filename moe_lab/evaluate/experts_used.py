"""Which experts tokens use, and how many different ones a batch of them needs.

What a decoding step costs that is bound by memory depends on the latter (the T of OEA 2511.02237),
since each of them is read once for the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_lab import processes
from moe_lab.models.active import active_parameters, expert_flops, num_real_experts
from moe_lab.models.checkpoint import Model
from moe_lab.models.layers import MoELayer
from moe_lab.models.remapped import RemappedExperts

BATCHES = (1, 8, 16, 32)  # tokens of a decoding step, one of each sequence


class ExpertsUsed:
    """Of one layer: the tokens that used each expert that exists [E], and what all of them had.

    Stand-ins, zero experts and those that a rule left out are no experts here; an expert to which
    two of a token's router rows lead is one, and computed twice.
    """

    def __init__(self, layer: MoELayer):
        self.index, self._experts = layer.info.index, layer.experts
        self.tokens, self.pairs = 0, torch.zeros((), dtype=torch.int64)
        self.count_E = torch.zeros(num_real_experts(layer), dtype=torch.int64)

    def add(self, index_TK: Tensor) -> None:
        """Take in choices, as the router names them; an index behind all rows is no expert."""
        number = len(self.count_E)
        place_TK = index_TK
        if isinstance(self._experts, RemappedExperts):
            place_TK = self._experts.place_E[index_TK]
        place_TK = place_TK.clamp(max=number)
        used_TE = torch.zeros(len(place_TK), number + 1, dtype=torch.bool, device=place_TK.device)
        used_TE.scatter_(1, place_TK, True)
        # Where the choices lie, until they are gathered: a GPU is not waited for.
        self.count_E = self.count_E.to(place_TK.device) + used_TE[:, :number].sum(dim=0)
        self.pairs = self.pairs.to(place_TK.device) + (place_TK < number).sum()
        self.tokens += len(place_TK)

    def gathered(self) -> ExpertsUsed:
        """With what all processes saw, in place."""
        parts = processes.gather((self.tokens, self.pairs.tolist(), self.count_E.tolist()))
        tokens, pairs, counts = zip(*parts, strict=True)
        self.tokens, self.pairs = sum(tokens), torch.tensor(pairs).sum()
        self.count_E = torch.tensor(counts).sum(dim=0)
        return self

    def distinct(self, batch: int) -> float:
        """How many different experts `batch` tokens need, drawn at random without replacement.

        The exact mean over all such draws from the tokens that were seen, at least so many: of an
        expert that c of n tokens use, none in the batch does with the probability
        prod_i (n - c - i) / (n - i), i < batch.
        """
        unused_E = torch.ones(len(self.count_E), dtype=torch.float64)
        for i in range(batch):
            left_E = (self.tokens - self.count_E - i).clamp(min=0)
            unused_E *= left_E.double() / (self.tokens - i)
        return float((1 - unused_E).sum())


def used_figures(model: Model, layers: Sequence[ExpertsUsed]) -> dict[str, float]:
    """HeldOut's figures of what tokens used; none without MoE layers or tokens."""
    if not layers or not layers[0].tokens:
        return {}
    used = {one.index: float(one.count_E.sum()) / one.tokens for one in layers}
    computed = {one.index: int(one.pairs) / one.tokens for one in layers}
    figures = {
        "routing/active_parameters": float(active_parameters(model, used)),
        "routing/expert_flops": expert_flops(model, computed),
    }
    for batch in BATCHES:
        if layers[0].tokens >= batch:
            means = [one.distinct(batch) for one in layers]
            figures[f"routing/distinct_experts_{batch}"] = sum(means) / len(means)
    return figures


def used_by_layer(layers: Sequence[ExpertsUsed]) -> dict[str, list[float]]:
    """By layer: how many experts a token had that were computed, and how many a batch needs.

    Nothing without MoE layers or tokens.
    """
    if not layers or not layers[0].tokens:
        return {}
    told = {"experts_per_token": [int(one.pairs) / one.tokens for one in layers]}
    for batch in BATCHES:
        if layers[0].tokens >= batch:
            told[f"distinct_experts_{batch}"] = [one.distinct(batch) for one in layers]
    return told
