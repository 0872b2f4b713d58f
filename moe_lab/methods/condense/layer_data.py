"""What a condensed layer is fitted to: what its block gets, and what it should add, token by token.

Letters: t tokens of one batch, valid ones only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_lab.models.predictions import exact
from moe_lab.models.stream import LayerStream, States, swapped
from moe_lab.profile.documents import held_out
from moe_lab.profile.grams import weights_of_states

PROPAGATIONS = ("none", "block", "residual")
TOKENS_OF_A_CHUNK = 1024


@dataclass(frozen=True)
class LayerTokens:
    """Some tokens of the calibration set at one layer.

    x_TD: what the block gets; target_TD: what it should add; weight_T: what the squared error of
    each token weighs; held_T: whether it is of a document that judges what others fitted.
    """

    x_TD: Tensor
    target_TD: Tensor
    weight_T: Tensor
    held_T: Tensor

    def part(self, chosen_T: Tensor) -> LayerTokens:
        """Those of its tokens that are marked."""
        return LayerTokens(
            self.x_TD[chosen_T], self.target_TD[chosen_T], self.weight_T[chosen_T],
            self.held_T[chosen_T],
        )  # fmt: skip


class OwnText(NamedTuple):
    """Documents, from this place on, that the model wrote itself (`profile/own_text.py`).

    weight: what all of their tokens weigh together, in shares of what all others do.
    """

    first: int
    weight: float


class LayerData:
    """All tokens of a stream at one layer; the states lie in the stream's cache."""

    def __init__(self, stream: LayerStream, own: OwnText | None = None):
        self.stream = stream
        held = held_out(stream.positions)
        first = math.inf if own is None else own.first
        written_by_it = {place for place in stream.positions if place >= first}
        batches = range(stream.num_batches)
        self._held = [stream.are_of(held, batch) for batch in batches]
        self._own = [stream.are_of(written_by_it, batch) for batch in batches]
        written = sum(int(one.sum()) for one in self._own)
        given = sum(len(one) for one in self._own) - written
        self._factor = own.weight * given / written if own and written else 1.0
        self._weights: list[Tensor] = []

    def add(self, x_TD: Tensor, target_TD: Tensor, weight_T: Tensor) -> None:
        """The valid tokens of the next batch."""
        batch = len(self._weights)
        self.stream.cache["fit input", batch] = x_TD
        self.stream.cache["fit target", batch] = target_TD
        self._weights.append(torch.where(self._own[batch], self._factor * weight_T, weight_T))

    def chunks(self, held: bool | None = None) -> Iterator[LayerTokens]:
        """The tokens in order, a chunk at a time; those held out, or the others."""
        for batch, (weight_T, held_T) in enumerate(zip(self._weights, self._held, strict=True)):
            names = ("fit input", "fit target")
            parts = [self.stream.cache[name, batch] for name in names]
            whole = LayerTokens(parts[0], parts[1], weight_T, held_T)
            chosen = whole if held is None else whole.part(held_T == held)
            split = (
                getattr(chosen, name).split(TOKENS_OF_A_CHUNK)
                for name in ("x_TD", "target_TD", "weight_T", "held_T")
            )
            for one in zip(*split, strict=True):
                if len(one[0]):
                    yield LayerTokens(*one)

    def close(self) -> None:
        """Give the memory back."""
        for batch in range(len(self._weights)):
            for name in ("fit input", "fit target"):
                self.stream.cache.pop((name, batch))


class Walk:
    """A stream's layers in ascending order, behind those that are condensed already.

    propagate says what a layer is fitted to, with x what its block gets:
    none: as in the intact model, x and what its block adds there;
    block: x behind the condensed layers, and what the intact block would add to that;
    residual: x behind the condensed layers, and what is missing there to the state that leaves the
    layer in the intact model, so that it repairs what the layers before it broke.
    token_weight=output: each token weighs 1 / mean square of the state that leaves the layer, so
    that what counts is the relative error of that state; none: all alike.
    """

    def __init__(
        self, stream: LayerStream, propagate: str, token_weight: str, own: OwnText | None = None
    ):
        self.stream, self.token_weight, self.own = stream, token_weight, own
        self.behind = States(stream, "behind")
        # Those that should leave a layer, where they are not what it makes of those that it gets.
        self.intact = States(stream, "intact") if propagate == "residual" else None

    def data(self, index: int) -> LayerData:
        """What layer `index` is fitted to; its weights must be in memory."""
        stream, data = self.stream, LayerData(self.stream, self.own)
        self.behind.move_to(index)
        if self.intact:
            self.intact.pass_through(index, functools.partial(stream.replay, index))
        for batch, valid in enumerate(stream.valid):
            output, rest_TD, x_TD = stream.replay_open(index, batch, self.behind[batch])
            leaving_TD = exact((self.intact[batch] if self.intact else output)[valid])
            weight_T = weights_of_states(leaving_TD, self.token_weight)
            data.add(x_TD, leaving_TD - exact(rest_TD), weight_T)
        return data

    def condense(self, index: int, block: nn.Module | None) -> None:
        """Go behind layer `index`, which becomes `block` (None: nothing changes)."""
        with self.stream.layer(index), swapped(self.stream, index, block):
            self.behind.pass_through(index, functools.partial(self.stream.replay, index))
