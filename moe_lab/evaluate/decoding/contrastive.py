"""Contrastive search: likely tokens whose state is unlike those before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

from moe_lab.evaluate.decoding.base import Decoder, Decoding
from moe_lab.models.checkpoint import Model
from moe_lab.models.generating import ContrastiveSearch
from moe_lab.option import Option


@dataclass(frozen=True)
class Contrastive(Decoding):
    """Contrastive search (2202.06417): of the k likeliest tokens the one with the highest
    (1 - penalty_alpha) p(v) - penalty_alpha max_j cos(h_v, h_j), h the last hidden states. It only
    searches: log-likelihoods are the model's own."""

    k: Annotated[int, Option("candidates for each token", least=1)] = 4
    penalty_alpha: Annotated[
        float, Option("weight of being like what stands before", least=0, most=1)
    ] = 0.6

    @contextmanager
    def opened(self, model: Model) -> Iterator[Decoder]:
        """The model, with its own loop."""
        decoder = Decoder(model)
        decoder.loop = ContrastiveSearch(self.k, self.penalty_alpha)
        yield decoder
