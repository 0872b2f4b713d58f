"""Dynamic routing: as many experts as a share of the router's probability needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

from moe_lab.evaluate.decoding.base import Decoder, Decoding
from moe_lab.models.checkpoint import Model
from moe_lab.models.rerouting import Rerouting, up_to_share
from moe_lab.option import Option


@dataclass(frozen=True)
class Dynamic(Decoding):
    """Dynamic routing (2403.07652), untrained, as SCMoE (2405.14507) compares itself with: in every
    MoE layer a token gets the fewest experts whose probabilities add up to `threshold` (top-p), the
    likeliest first. Text and log-likelihoods are those of the model so routed.

    The first paper trains for it, with a loss on the router's entropy. Where a router adds a bias
    or works on groups, probabilities are its weights without the bias, over the groups it picked.
    """

    threshold: Annotated[
        float, Option("probability that the experts of a token reach", above=0, most=1)
    ] = 0.4

    @contextmanager
    def opened(self, model: Model) -> Iterator[Decoder]:
        """The model, routed so all the while."""
        routing = Rerouting(model, lambda ask: up_to_share(ask, self.threshold))
        with routing.active():
            yield Decoder(model)
