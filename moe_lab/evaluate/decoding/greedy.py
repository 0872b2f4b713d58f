"""Greedy: the likeliest token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from moe_lab.evaluate.decoding.base import Decoder, Decoding
from moe_lab.models.checkpoint import Model


@dataclass(frozen=True)
class Greedy(Decoding):
    """The model's own logits, and transformers' own loop: the likeliest token, or what else a
    task's generation_kwargs ask for."""

    @contextmanager
    def opened(self, model: Model) -> Iterator[Decoder]:
        """The model as it is."""
        yield Decoder(model)
