"""The gradient of a model's loss at the outputs of its experts, one decoder layer at a time.

A forward pass keeps what every decoder layer gets; the head gives the gradient at the last hidden
state; then each layer, from the last one to the first MoE layer, is replayed with the graph of that
layer alone. No weight has a gradient, and memory holds one layer and one batch of its graph.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_lab.models.observing import observe
from moe_lab.models.stream import LayerStream, check_state
from moe_lab.types import LayerInfo, Routing, UserError

logger = logging.getLogger(__name__)
LABEL_KINDS = ("text", "sampled")


@dataclass(frozen=True)
class LossLabels:
    """Which next tokens the loss is of.

    kind: text, those of the calibration set; sampled, drawn from the model's own predictions,
    `samples` times at each position, each time a loss of its own. What is drawn depends on the seed
    and on where a document stands, not on how documents are batched.
    """

    kind: str = "text"
    samples: int = 1
    seed: int = 0

    @property
    def draws(self) -> int:
        """How many losses there are."""
        return self.samples if self.kind == "sampled" else 1


@dataclass(frozen=True)
class OutputGradients:
    """One batch at one MoE layer, valid tokens only.

    index: the decoder layer's; batch: its number; routing: with the hidden units, and no graph.
    of_draw: for each loss its gradient [S, D] at the output of every chosen expert before the
    router's weight, which is inside by the chain rule; beside the routing's pairs, float32 or
    better.
    """

    index: int
    batch: int
    routing: Routing
    of_draw: list[Tensor]


class Backward:
    """A backward pass over a stream.

    The loss is the mean cross entropy in nats over all positions whose token and next token are
    data. Raises UserError for families whose layers hand on more than the hidden state, before any
    work.
    """

    def __init__(self, stream: LayerStream, labels: LossLabels | None = None):
        stream.check_hidden_alone(
            "gradients cannot go backwards layer by layer in this family: choose a metric of "
            "statistics, such as metric=energy"
        )
        self.stream, self.labels = stream, labels or LossLabels()
        self.first = min(stream.moe)
        self.num_targets = sum(int(self._targets(batch).sum()) for batch in self._batches)
        if not self.num_targets:
            raise UserError(
                "the calibration set has no next token to predict: its samples have one token each "
                "(calibration.max_length)"
            )
        self._tell_cost()

    def outputs(self) -> Iterator[OutputGradients]:
        """Each batch at each MoE layer, the last layer first; its weights are in memory."""
        self._forward()
        for batch in self._batches:
            self._at_head(batch)
        for index in range(len(self.stream.layers) - 1, self.first - 1, -1):
            yield from self._through(index)

    @property
    def _batches(self) -> range:
        return range(self.stream.num_batches)

    def _tell_cost(self) -> None:
        stream, draws = self.stream, self.labels.draws
        documents = sum(len(valid) for valid in stream.valid)
        logger.info(
            "gradients: 2 forwards and %d backward%s over %d samples, one decoder layer in memory",
            draws, "s" * (draws > 1), documents,
        )  # fmt: skip
        states = len(stream.layers) - self.first + 1 + draws
        stream.cache.announce({"states before every layer": states * stream.state_bytes()})

    @torch.no_grad()
    def _forward(self) -> None:
        """Keep the states before each layer from the first MoE layer on, and behind the last."""
        cache = self.stream.cache
        for index in range(len(self.stream.layers)):
            with self.stream.layer(index):
                for batch in self._batches:
                    hidden = self._state(index, batch)
                    cache["before", index + 1, batch] = self.stream.replay(index, batch, hidden)
                    if 0 < index < self.first:
                        cache.pop(("before", index, batch))

    def _state(self, index: int, batch: int) -> Tensor:
        """What decoder layer `index` gets, [B, L, D]."""
        key = ("before", index, batch) if index else ("input", batch)
        return self.stream.cache[key].detach()

    def _targets(self, batch: int) -> Tensor:
        """Where a token and its next one are data, [B, L - 1] bool."""
        valid = self.stream.valid[batch]
        return valid[:, :-1] & valid[:, 1:]

    @torch.enable_grad()
    def _at_head(self, batch: int) -> None:
        """The gradient of each loss at the last hidden state of a batch."""
        last = len(self.stream.layers)
        hidden = self._state(last, batch).requires_grad_()
        self.stream.cache.pop(("before", last, batch))
        check_state(hidden, last - 1)
        logits = self.stream.logits(batch, hidden)
        logits_NV = logits[:, :-1][self._targets(batch)]
        logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
        for draw, labels_N in enumerate(self._drawn(batch, logits_NV.detach())):
            loss = F.cross_entropy(logits_NV, labels_N, reduction="sum")
            more = draw + 1 < self.labels.draws
            [gradient] = torch.autograd.grad(loss, hidden, retain_graph=more)
            self.stream.cache["gradient", draw, batch] = gradient

    def _drawn(self, batch: int, logits_NV: Tensor) -> Iterator[Tensor]:
        """The labels [N] of a batch's targets, of each loss."""
        if self.labels.kind == "text":
            yield self.stream.input_ids[batch][:, 1:][self._targets(batch)]
            return
        counts = self._targets(batch).sum(dim=1).tolist()
        before = sum(len(valid) for valid in self.stream.valid[:batch])
        sampled = []
        for row, logits_nV in enumerate(logits_NV.split(counts)):
            position = self.stream.positions[before + row]
            generator = torch.Generator().manual_seed(self.labels.seed * 1_000_003 + position)
            shape = self.labels.samples, len(logits_nV), 1
            level = torch.rand(shape, generator=generator, dtype=torch.float64)
            summed_nV = logits_nV.double().softmax(dim=-1).cumsum(dim=-1)
            levels = level.to(summed_nV.device) * summed_nV[:, -1:]
            found = [torch.searchsorted(summed_nV, one, right=True)[:, 0] for one in levels]
            sampled.append(torch.stack(found).clamp(max=summed_nV.shape[-1] - 1))
        yield from torch.cat(sampled, dim=1)

    def _through(self, index: int) -> Iterator[OutputGradients]:
        """Go backwards through one decoder layer; what its experts give is caught on the way."""
        found: list[Routing] = []
        summed: list[Tensor] = []

        def keep(info: LayerInfo, routing: Routing) -> None:
            found.append(routing)

        def catch(module: object, args: object, output: Tensor) -> None:
            summed.append(output)

        moe = self.stream.moe.get(index)
        handle = moe.experts.register_forward_hook(catch) if moe else None
        try:
            with (
                self.stream.layer(index),
                observe(self.stream.model, keep, neurons=True) as observation,
            ):
                for batch in self._batches:
                    observation.valid = self.stream.valid[batch]
                    gradients = self._replayed(index, batch, summed)
                    summed.clear()
                    if found:
                        routing = _detached(found.pop())
                        valid = observation.valid.reshape(-1)
                        of_draw = [self._at_pairs(routing, one[valid]) for one in gradients]
                        yield OutputGradients(index, batch, routing, of_draw)
        finally:
            if handle is not None:
                handle.remove()

    @torch.enable_grad()
    def _replayed(self, index: int, batch: int, summed: list[Tensor]) -> list[Tensor]:
        """The gradients of each loss [B * L, D] at the routed experts' weighted sum, if any."""
        cache = self.stream.cache
        hidden = self._state(index, batch).requires_grad_()
        output = self.stream.replay(index, batch, hidden)
        found: list[Tensor] = []
        for draw in range(self.labels.draws):
            gradient, *of_sum = torch.autograd.grad(
                output, [hidden, *summed], cache["gradient", draw, batch],
                retain_graph=draw + 1 < self.labels.draws,
            )  # fmt: skip
            check_state(gradient, index)
            cache["gradient", draw, batch] = gradient
            found += of_sum
        cache.pop(("before", index, batch))
        return found

    def _at_pairs(self, routing: Routing, gradient_TD: Tensor) -> Tensor:
        """The gradient [S, D] at each expert's output: of the sum's, times the router's weight."""
        exact = torch.promote_types(gradient_TD.dtype, torch.float32)
        weight_S = routing.weight_S.to(exact) / self.num_targets
        return gradient_TD.to(exact)[routing.token_S] * weight_S[:, None]


def _detached(routing: Routing) -> Routing:
    """The same numbers without the graph that they came from."""
    values = {one.name: getattr(routing, one.name) for one in dataclasses.fields(routing)}
    tensors = {name: value.detach() for name, value in values.items() if value is not None}
    return dataclasses.replace(routing, **tensors)
