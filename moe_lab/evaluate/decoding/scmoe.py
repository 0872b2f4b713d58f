"""SCMoE: a model's strong routing contrasted with a weak one of the same model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from moe_lab.evaluate.decoding.base import Decoder, Decoding
from moe_lab.models.checkpoint import Model
from moe_lab.models.generating import TwoPasses
from moe_lab.models.opening import text_config
from moe_lab.models.rerouting import (
    AskedRouter,
    Choosing,
    Rerouting,
    TokenIds,
    at_rank,
    drawn,
    usable_rows,
    with_number,
)
from moe_lab.option import Option
from moe_lab.types import LayerInfo, UserError

Open = Callable[[], AbstractContextManager[None]]


def valid_tokens(strong: Tensor, alpha: float) -> Tensor:
    """Tokens with at least alpha of the likeliest one's probability: z >= log alpha + max z."""
    return strong >= math.log(alpha) + strong.amax(dim=-1, keepdim=True)


def contrasted(strong: Tensor, weak: Tensor, alpha: float, beta: float) -> Tensor:
    """z = (1 + beta) strong - beta weak of raw logits [..., V] for valid tokens, else -inf."""
    z = (1 + beta) * strong - beta * weak
    return z.masked_fill(~valid_tokens(strong, alpha), -torch.inf)


def contrasted_probabilities(strong: Tensor, weak: Tensor, alpha: float, beta: float) -> Tensor:
    """Logarithms of probabilities [..., V] in which no token has none.

    p(i) = P(valid) softmax(z)(i) for valid tokens and strong(i) for the others, with P(valid) what
    the strong routing gives to all valid ones: the contrast moves probability among them alone.
    """
    own, valid = strong.log_softmax(dim=-1), valid_tokens(strong, alpha)
    mass = own.masked_fill(~valid, -torch.inf).logsumexp(dim=-1, keepdim=True)
    inside = contrasted(strong, weak, alpha, beta).log_softmax(dim=-1)
    return torch.where(valid, inside + mass, own)


class ContrastingDecoder(Decoder):
    """A model with two routings, each opened for its own forward passes."""

    shares_prompts = False  # two caches would have to be carried along

    def __init__(self, model: Model, strongly: Open, weakly: Open, asked: SCMoE):
        super().__init__(model)
        self.strongly, self.weakly, self.asked = strongly, weakly, asked
        self.loop = TwoPasses(strongly, weakly, self._scores)

    def _scores(self, strong: Tensor, weak: Tensor) -> Tensor:
        return contrasted(strong, weak, self.asked.alpha, self.asked.beta)

    def logits(self, ids_BL: Tensor, chosen_BL: Tensor, cache: Any = None) -> Tensor:
        """Of `contrasted_probabilities`."""
        with self.strongly():
            strong_NV = super().logits(ids_BL, chosen_BL)
        with self.weakly():
            weak_NV = super().logits(ids_BL, chosen_BL)
        alpha, beta = self.asked.alpha, self.asked.beta
        return contrasted_probabilities(strong_NV.float(), weak_NV.float(), alpha, beta)


@dataclass(frozen=True)
class SCMoE(Decoding):
    """Self-contrast (SCMoE, 2405.14507): the next token is the highest
    z = (1 + beta) z_strong - beta z_weak among tokens with z_strong >= log alpha + max z_strong.

    Both are raw logits of the same model, from passes with caches of their own: strong with its own
    routing (or `strong_top_k` experts), weak with one expert a token in every MoE layer: that at
    `rank` of its router's order, or one drawn at random. Its weight is 1 where the family
    renormalises, times the family's scaling factor, and else the router's own for it. Layers
    without experts to choose are the same in both.

    The paper tunes beta for each task on the test set; 0.5 is its code's default. Its code also
    forbids the end of the text unless told otherwise, which is not done here. It has no
    log-likelihoods; here they are of `contrasted_probabilities`, in which no token has none.
    """

    alpha: Annotated[
        float, Option("least share of the likeliest token's probability", above=0, most=1)
    ] = 0.1
    beta: Annotated[float, Option("how much of the weak logits is taken off", least=0)] = 0.5
    weak: Annotated[
        str, Option("which one expert the weak routing takes", among=("rank", "random"))
    ] = "rank"
    rank: Annotated[int, Option("of weak=rank: its place in the router's order", least=1)] = 2
    strong_top_k: Annotated[
        int | None, Option("experts per token of the strong routing, null for the model's", least=1)
    ] = None
    seed: Annotated[int, Option("of weak=random")] = 0

    def identity(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """All options that decide something."""
        unused = {"seed"} if self.weak == "rank" else {"rank"}
        return {name: value for name, value in options.items() if name not in unused}

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse a rank, or a number of experts, that a layer has not."""
        super().check(layers)
        wanted = {"rank": self.rank if self.weak == "rank" else 1}
        wanted["strong_top_k"] = self.strong_top_k or 1
        for name, number in wanted.items():
            for info in layers:
                if number > (most := usable_rows(info)):
                    raise UserError(
                        f"decoding.{name}={number}: layer {info.index} has {info.num_experts} "
                        f"experts, of which a token can be sent to {most}: 1 to {most} is possible"
                    )

    @contextmanager
    def opened(self, model: Model) -> Iterator[Decoder]:
        """The model with its two routings."""
        tokens = TokenIds(model)
        weak = Rerouting(model, lambda ask: self._weak(ask, model, tokens))
        strongly: Open = nullcontext
        if (number := self.strong_top_k) is not None:
            asked = f"decoding.strong_top_k={number}"
            strongly = Rerouting(model, lambda ask: with_number(ask, number, asked)).active
        with tokens.watched():
            yield ContrastingDecoder(model, strongly, weak.active, self)

    def _weak(self, ask: AskedRouter, model: Model, tokens: TokenIds) -> Choosing:
        if self.weak == "rank":
            return at_rank(ask, self.rank, f"decoding.rank={self.rank}")
        return drawn(ask, tokens, text_config(model.config).vocab_size, self.seed)
