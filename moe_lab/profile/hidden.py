"""What the hidden units of one layer's experts compute, batch by batch, and what that is good for.

A routing (`types.Routing`) holds it beside all else that is known of a batch at an MoE layer. It is
made anew whenever it is asked for: a layer's hidden units are too many to be kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_lab.models.hidden_units import HiddenUnits
from moe_lab.models.observing import observe
from moe_lab.models.stream import LayerStream, States
from moe_lab.profile.profile import Profile
from moe_lab.types import LayerInfo, Routing


class HiddenStates:
    """The MoE layers of an intact model over a stream's batches; layers come in ascending order."""

    def __init__(self, stream: LayerStream):
        self.stream, self.states = stream, States(stream)

    def routings(self, index: int) -> Iterator[Routing]:
        """Each batch at one MoE layer, with its hidden units; the layer's weights are in memory.

        The states go on to the next layer on the way: a layer is asked for once, and to its end.
        """
        self.states.move_to(index)
        found: list[Routing] = []

        def keep(info: LayerInfo, routing: Routing) -> None:
            found.append(routing)

        with observe(self.stream.model, keep, neurons=True) as observation:

            def compute(batch: int, hidden: Tensor) -> Tensor:
                observation.valid = self.stream.valid[batch]
                return self.stream.replay(index, batch, hidden)

            for _ in self.states.through(index, compute):
                yield found.pop()


def hidden_by_expert(
    routing: Routing, num_experts: int
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Of each expert with tokens: its number, hidden [n, I], weights [n], rows in the batch [n]."""
    counts = torch.bincount(routing.expert_S, minlength=num_experts).tolist()
    assert routing.hidden_SI is not None
    parts = (routing.hidden_SI, routing.weight_S, routing.token_S)
    split = zip(*(part.split(counts) for part in parts), strict=True)
    for expert, (h_NI, weight_N, token_N) in enumerate(split):
        if len(h_NI):
            yield expert, h_NI, weight_N, token_N


def output_errors(
    profile: Profile, num_samples: int | None, sets: Mapping[int, Sequence[Tensor]]
) -> dict[int, list[float]]:
    """The relative error of a layer's routed output with each of these sets of hidden units.

    sum over tokens of ||F(x; set) - F(x)||^2 / sum of ||F(x)||^2; sets: [E, I] bool, by layer.
    """
    opened: list[HiddenStates] = []

    def work(index: int) -> list[float]:
        if not opened:
            opened.append(HiddenStates(profile.open_stream(num_samples)))
        return _errors(opened[0], index, sets[index])

    def answer(index: int) -> list[float]:
        digests = [digest_of(kept) for kept in sets[index]]
        question: dict[str, Any] = {
            "question": "relative error of the output without hidden units",
            "layer": index, "sets": digests, "num_samples": num_samples,
        }  # fmt: skip
        return profile.remember(question, lambda: work(index), [output_errors])

    return {index: answer(index) for index in sorted(sets)}


def digest_of(*parts: Tensor | None) -> str:
    """What tensors of whole numbers, or of truths, are known by in an identity."""
    digest = hashlib.sha256()
    for part in (part for part in parts if part is not None):
        digest.update(part.to(torch.int64).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _errors(states: HiddenStates, index: int, sets: Sequence[Tensor]) -> list[float]:
    layer = states.stream.moe[index]
    error, square = torch.zeros(len(sets), dtype=torch.float64), 0.0
    for routing in states.routings(index):
        columns_EID = HiddenUnits(layer.experts).down_columns()
        exact = torch.promote_types(columns_EID.dtype, torch.float32)
        shape = len(routing.x_TD), columns_EID.shape[2]
        whole_TD = torch.zeros(shape, dtype=exact, device=columns_EID.device)
        lost = [torch.zeros_like(whole_TD) for _ in sets]
        for expert, h_NI, weight_N, token_N in hidden_by_expert(routing, len(columns_EID)):
            gated_NI = h_NI.to(exact) * weight_N.to(exact)[:, None]
            column_ID = columns_EID[expert].to(exact)
            for place, kept_EI in enumerate(sets):
                gone = (~kept_EI[expert]).nonzero()[:, 0].to(h_NI.device)
                lost[place].index_add_(0, token_N, gated_NI[:, gone] @ column_ID[gone])
        weighted_SD = routing.y_SD.to(exact) * routing.weight_S.to(exact)[:, None]
        whole_TD.index_add_(0, routing.token_S, weighted_SD)
        square += float(whole_TD.double().square().sum())
        error += torch.stack([one.double().square().sum() for one in lost]).cpu()
    return (error / square).tolist() if square else [0.0] * len(sets)
