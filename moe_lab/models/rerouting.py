"""Other experts for each token than its router's own choice, for a while.

A router is asked for other numbers of experts than its own, and what it hands to the experts is
made of its answers: scores, biases, groups and renormalisation stay the family's. Letters: see
`types.py`; tensors of routers may have further dimensions in the place of T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_lab.models.layers import MoELayer, moe_layers, routed_modules
from moe_lab.models.probing import PROBES, probe, route
from moe_lab.models.routers import top_k_places
from moe_lab.models.skipping import none_skipped
from moe_lab.types import LayerInfo, UserError

Routed = tuple[Any, ...]  # what a router returns: logits, weights, indices, and perhaps more
Choosing = Callable[..., Routed]  # a router's forward


class AskedRouter:
    """A layer's router, which can be asked for any number of experts.

    renormalises: whether the weight of an only expert says nothing, as it is always the same.
    usable: how many of its rows one token can be sent to. skips: whether a rule that leaves out
    some of the chosen experts (`skipping.py`) still does: of an only one it might leave none.
    """

    def __init__(self, layer: MoELayer):
        self.layer, self.skips = layer, False
        self.inner: Choosing = layer.router.forward
        self.usable = usable_rows(layer.info, route(layer, probe(layer, tokens=1))[0].shape[-1])
        self.places = top_k_places(routed_modules(layer))
        self.renormalises = self._gives_one_weight()

    def __call__(self, number: int, *arguments: Any, **named: Any) -> Routed:
        """What it returns where a token gets `number` experts."""
        for module, field, _ in self.places:
            setattr(module, field, number)
        try:
            with nullcontext() if self.skips else none_skipped(self.layer.router):
                return self.inner(*arguments, **named)
        finally:
            for module, field, value in self.places:
                setattr(module, field, value)

    def check(self, number: int, asked: str) -> None:
        """Refuse a number of experts that a token cannot get here; asked: what a user set."""
        index = self.layer.info.index
        if number > self.usable:
            raise UserError(
                f"{asked}: a token can be sent to {self.usable} experts of layer {index}, so that "
                f"1 to {self.usable} is possible"
            )
        try:
            chosen = self._tried(number)[2].shape[-1]
        except (RuntimeError, ValueError, IndexError):  # of routers that cannot choose so many
            chosen = 0
        if chosen != number:
            raise UserError(
                f"{asked}: the router of layer {index} cannot be asked for {number} experts of a "
                f"token in the place of its {self.layer.info.top_k}"
            )

    @torch.no_grad()
    def _gives_one_weight(self) -> bool:
        """Whether an only expert always has the same weight; not known of a model without any."""
        self.check(1, "eval.decoding")
        weight_T1 = self._tried(1, PROBES)[1]
        return not weight_T1.is_meta and torch.allclose(weight_T1, weight_T1[:1], rtol=1e-4)

    @torch.no_grad()
    def _tried(self, number: int, tokens: int = 1) -> Routed:
        """Its answer to random tokens."""
        router = self.layer.router
        before = vars(router).get("forward")
        router.forward = lambda *arguments, **named: self(number, *arguments, **named)
        try:
            return route(self.layer, probe(self.layer, tokens))
        finally:
            restore_forward(router, before)


def usable_rows(info: LayerInfo, num_rows: int | None = None) -> int:
    """How many rows of a layer's router one token can be sent to: of the groups that it may use."""
    number = info.num_rows if num_rows is None else num_rows
    return number // info.groups * info.groups_used


def restore_forward(router: nn.Module, before: Choosing | None) -> None:
    """Give a router the forward that it had of its own; None: that of its class."""
    if before is None:
        del router.forward
    else:
        router.forward = before


class Rerouting:
    """All MoE layers of a model with other forwards of their routers, which can be put in often.

    forward_of: what takes the place of a router's forward; raises UserError where it cannot.
    """

    def __init__(self, model: PreTrainedModel, forward_of: Callable[[AskedRouter], Choosing]):
        self.forwards = [
            (layer.router, forward_of(AskedRouter(layer))) for layer in moe_layers(model)
        ]

    @contextmanager
    def active(self) -> Iterator[None]:
        """While open, the model routes so."""
        before = [vars(router).get("forward") for router, _ in self.forwards]
        for router, forward in self.forwards:
            router.forward = forward
        try:
            yield
        finally:
            for (router, _), own in zip(self.forwards, before, strict=True):
                restore_forward(router, own)


def with_number(ask: AskedRouter, number: int, asked: str) -> Choosing:
    """The router's own choice of another number of experts, a rule behind it included."""
    ask.check(number, asked)
    ask.skips = True
    return lambda *arguments, **named: ask(number, *arguments, **named)


def at_rank(ask: AskedRouter, rank: int, asked: str) -> Choosing:
    """Only the expert at this rank of the router's own order, 1 the first.

    It is the one among the first `rank` that is not among the first `rank` - 1, by whatever the
    router chooses (scores with their biases, inside the groups that it picked). Its weight is that
    of an only expert where the family renormalises (1, times its scaling factor), and the router's
    weight for this expert elsewhere.
    """
    ask.check(rank, asked)

    def forward(*arguments: Any, **named: Any) -> Routed:
        logits, weight, index, *rest = ask(rank, *arguments, **named)
        if rank > 1:
            first = ask(1, *arguments, **named)
            before = first[2] if rank == 2 else ask(rank - 1, *arguments, **named)[2]
            new = (index[..., :, None] != before[..., None, :]).all(dim=-1)
            place = new.to(torch.uint8).argmax(dim=-1, keepdim=True)
            index = index.gather(-1, place)
            weight = first[1] if ask.renormalises else weight.gather(-1, place)
        return logits, weight, index, *rest

    return forward


def drawn(
    ask: AskedRouter, token_ids: Callable[[], Tensor], vocabulary: int, seed: int
) -> Choosing:
    """Only one expert, drawn evenly among those that a token can be sent to.

    The draw is made once for each layer and each token id, so that it depends neither on the batch
    nor on where a token stands. Weights as of `at_rank`. token_ids: those of the running forward.
    """
    ask.check(ask.usable, "decoding.weak=random")
    generator = torch.Generator().manual_seed(seed * 100_003 + ask.layer.info.index)
    place_V = torch.randint(ask.usable, (vocabulary,), generator=generator)

    def forward(*arguments: Any, **named: Any) -> Routed:
        logits, weight, index, *rest = ask(ask.usable, *arguments, **named)
        index, order = index.sort(dim=-1)
        ids = token_ids().reshape(index.shape[:-1])
        place = place_V.to(ids.device)[ids][..., None].to(index.device)
        if ask.renormalises:
            weight = ask(1, *arguments, **named)[1]
        else:
            weight = weight.gather(-1, order).gather(-1, place)
        return logits, weight, index.gather(-1, place), *rest

    return forward


def up_to_share(ask: AskedRouter, share: float) -> Choosing:
    """The fewest experts whose router probabilities add up to at least `share` of all (top-p).

    Probabilities are the router's weights where a token gets every expert that it can be sent to,
    divided by their sum; the likeliest come first. The weights of those that stay are renormalised
    where the family does that. Tokens with fewer experts than another one in the batch get some
    with a weight of 0.
    """
    ask.check(ask.usable, "decoding=dynamic")

    def forward(*arguments: Any, **named: Any) -> Routed:
        logits, weight, index, *rest = ask(ask.usable, *arguments, **named)
        total = weight.float().sum(dim=-1, keepdim=True)
        probability, order = (weight.float() / total).sort(dim=-1, descending=True, stable=True)
        taken = probability.cumsum(dim=-1) - probability < share
        most = int(taken.sum(dim=-1).max())
        order, taken = order[..., :most], taken[..., :most]
        kept = weight.float().gather(-1, order) * taken
        if ask.renormalises:
            kept = kept / kept.sum(dim=-1, keepdim=True) * total
        return logits, kept.to(weight.dtype), index.gather(-1, order), *rest

    return forward


class TokenIds:
    """The token ids of a model's running forward pass, where its routers can look them up."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.ids = torch.zeros(0, dtype=torch.long)

    def __call__(self) -> Tensor:
        """Those of the forward that runs, [B, L]."""
        return self.ids

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While open, each forward's are noted."""

        def note(module: nn.Module, given: Sequence[Any], named: dict[str, Any]) -> None:
            self.ids = named["input_ids"] if "input_ids" in named else given[0]

        handle = self.model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
