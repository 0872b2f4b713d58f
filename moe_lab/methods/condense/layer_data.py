"""What a condensed layer is fitted to: what its block gets, and what it should add, token by token.

Letters: t tokens of one batch, valid ones only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_lab.models.predictions import exact
from moe_lab.models.stream import LayerStream, States, swapped
from moe_lab.profile.documents import held_out

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
        self._held = self._of_documents(lambda place: place in held)
        self._own = self._of_documents(lambda place: own is not None and place >= own.first)
        written = sum(int(one.sum()) for one in self._own)
        given = sum(len(one) for one in self._own) - written
        self._factor = own.weight * given / written if own and written else 1.0
        self._weights: list[Tensor] = []

    def _of_documents(self, says: Callable[[int], bool]) -> list[Tensor]:
        """What is said of each token's document, by batch [t]."""
        found = []
        for batch, valid in enumerate(self.stream.valid):
            places = self.stream.documents(batch)
            of_batch = torch.tensor([says(place) for place in places], device=valid.device)
            found.append(of_batch[:, None].expand(valid.shape)[valid])
        return found

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
        self.stream, self.propagate, self.token_weight = stream, propagate, token_weight
        self.own = own
        self.intact = States(stream, "intact")
        self.behind = States(stream, "behind") if propagate != "none" else self.intact

    def data(self, index: int) -> LayerData:
        """What layer `index` is fitted to; its weights must be in memory."""
        stream, data = self.stream, LayerData(self.stream, self.own)
        self.intact.move_to(index)
        self.behind.move_to(index)
        for batch, valid in enumerate(stream.valid):
            output, rest_TD, x_TD = stream.replay_open(index, batch, self.behind[batch])
            if self.propagate == "residual":
                output = stream.replay(index, batch, self.intact[batch])
            leaving_TD = exact(output[valid])
            data.add(x_TD, leaving_TD - exact(rest_TD), self._weight(leaving_TD))
        return data

    def _weight(self, leaving_TD: Tensor) -> Tensor:
        if self.token_weight == "none":
            return leaving_TD.new_ones(len(leaving_TD))
        square_T = leaving_TD.square().mean(dim=1)
        return torch.where(square_T > 0, 1 / square_T, 0.0)

    def condense(self, index: int, block: nn.Module | None) -> None:
        """Go behind layer `index`, which becomes `block` (None: nothing changes)."""
        replay = functools.partial(self.stream.replay, index)
        if self.behind is not self.intact:
            self.intact.pass_through(index, replay)
            with self.stream.layer(index), swapped(self.stream, index, block):
                self.behind.pass_through(index, replay)
        else:
            self.intact.pass_through(index, replay)
