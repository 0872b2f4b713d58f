"""The search for a condensed layer's experts: all outputs once, then sums and divergences.

CD-MoE (2412.00069) runs the whole model for every candidate; here a candidate costs one addition
and one divergence, since all layers but the one in question are intact.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_lab.methods.condense import divergence
from moe_lab.methods.condense.divergence import Divergence, weighted_mean
from moe_lab.models.condensing import check_condensable
from moe_lab.models.experts import expert_forward, expert_parameters, scales_input
from moe_lab.models.layers import MoELayer
from moe_lab.models.probing import Terms, terms
from moe_lab.models.stream import LayerStream, States
from moe_lab.profile.all_experts import check_outputs
from moe_lab.types import Choice, UserError

SEARCH_TOKENS_AT_ONCE = (
    1024  # candidates are compared chunk by chunk, so that a chunk stays in the cache
)


def search_terms(layer: MoELayer) -> Terms:
    """The factors of a block's two sums; UserError where it is no such sum, as a search needs."""
    found = None if scales_input(layer.experts) else terms(layer)
    if found is None:
        raise UserError(
            f"{type(layer.block).__name__} does more than add its shared and routed experts, so "
            "that a greedy search cannot add up candidates: choose experts and layers by "
            "statistics (condense.experts=mean_gate condense.layers=cosine), or name them"
        )
    return found


class OpenLayer:
    """An MoE layer of the intact model on the calibration tokens, with a growing set of experts.

    Every expert's output for every token is computed once; they, the intact output's probability
    and the output so far lie in the stream's cache, chunk by chunk: outputs [E, t, D], the others
    [t, D]. The output so far starts as the layer without routed experts (attention, residual, and
    the shared expert behind its constant gate).
    """

    def __init__(self, stream: LayerStream, index: int, gates_E: Tensor, shared_gate: float):
        self.cache, self.gates_E = stream.cache, gates_E
        self.finish = stream.finish if index == len(stream.layers) - 1 else lambda hidden: hidden
        self._layer, found = stream.moe[index], search_terms(stream.moe[index])
        self._shared_factor, self._routed_factor = shared_gate * found.shared, found.routed
        self._weights: list[Tensor] = []  # per chunk, each token's share in the mean

    def add_batch(self, output_TD: Tensor, rest_TD: Tensor, x_TD: Tensor, weight_T: Tensor) -> None:
        """Take in the valid tokens of a batch, while the layer's weights are there."""
        parameters = expert_parameters(self._layer.experts)
        parts = (part.split(SEARCH_TOKENS_AT_ONCE) for part in (output_TD, rest_TD, x_TD, weight_T))
        for output, base, x, weight in zip(*parts, strict=True):
            if self._layer.shared is not None:
                base = base + self._layer.shared(x) * self._shared_factor
            chunk = len(self._weights)
            self.cache["target", chunk] = divergence.probability(self.finish(output))
            self.cache["base", chunk] = base
            outputs = x.new_empty(len(parameters), *x.shape)  # filled in place: never held twice
            for expert, weights in enumerate(parameters):
                outputs[expert] = expert_forward(self._layer.experts, weights, x)
            check_outputs(outputs, self._layer.info.index)
            if self._routed_factor != 1.0:
                outputs *= self._routed_factor
            self.cache["outputs", chunk] = outputs
            self._weights.append(weight)

    def divergence(self, measure: Divergence) -> float:
        """Mean divergence of the output so far from the intact layer's."""
        total = 0.0
        for chunk, weight_T in enumerate(self._weights):
            value_T = measure(self.cache["target", chunk], self.finish(self.cache["base", chunk]))
            total += float(weighted_mean(weight_T, value_T))
        return total

    def divergences(self, measure: Divergence, experts: Sequence[int]) -> list[float]:
        """The same with each of `experts` added in turn."""
        sums = [0.0] * len(experts)
        for chunk, weight_T in enumerate(self._weights):
            u, base = self.cache["target", chunk], self.cache["base", chunk]
            outputs = self.cache["outputs", chunk]
            gates = self.gates_E.to(base)
            values = [
                weighted_mean(weight_T, measure(u, self.finish(base + gates[e] * outputs[e])))
                for e in experts
            ]
            sums = [a + b for a, b in zip(sums, torch.stack(values).tolist(), strict=True)]
        return sums

    def add(self, expert: int) -> None:
        """Add an expert behind its constant gate to the output so far."""
        for chunk in range(len(self._weights)):
            base = self.cache["base", chunk]
            gate = self.gates_E.to(base)[expert]
            self.cache["base", chunk] = base + gate * self.cache["outputs", chunk][expert]

    def close(self) -> None:
        """Give the memory back."""
        for chunk in range(len(self._weights)):
            for name in ("target", "base", "outputs"):
                self.cache.pop((name, chunk))


def greedy_experts(
    layer: OpenLayer, gates_E: Tensor, num_routed: int, measure: Divergence
) -> Choice:
    """Add, `num_routed` times, the expert that brings the layer's output closest to the intact one.

    Ties go to the lower expert. An expert that no calibration token was routed to has no mean gate:
    it is chosen only when others run out.
    """
    chosen: list[int] = []
    values = [layer.divergence(measure)]
    for _ in range(num_routed):
        rest = [i for i in range(len(gates_E)) if i not in chosen]
        rest = [i for i in rest if gates_E[i] != 0] or rest
        divergences = layer.divergences(measure, rest)
        best = min(range(len(rest)), key=divergences.__getitem__)
        chosen.append(rest[best])
        values.append(divergences[best])
        layer.add(rest[best])
    layer.close()
    return Choice(tuple(chosen), tuple(values))


class IntactStates(States):
    """Hidden states of the intact model, opened at the layers that are searched."""

    def open(self, index: int, gates_E: Tensor, shared_gate: float) -> OpenLayer:
        """An MoE layer on the intact model's own states; layers are asked for in order."""
        stream, opened = self.stream, OpenLayer(self.stream, index, gates_E, shared_gate)

        def compute(batch: int, hidden: Tensor) -> Tensor:
            if batch == 0:
                check_condensable(stream.moe[index])
            output, rest, x = stream.replay_open(index, batch, hidden)
            opened.add_batch(output[stream.valid[batch]], rest, x, stream.token_weight[batch])
            return output

        self.pass_through(index, compute)
        return opened
