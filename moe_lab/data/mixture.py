"""Several sources by weight."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, TypedDict

from moe_lab.data.source import Document, Source, has_text
from moe_lab.option import Option
from moe_lab.types import UserError


class Part(TypedDict):
    """A source of a mixture."""

    weight: float
    source: Source


@dataclass(frozen=True)
class Mixture(Source):
    """Several sources by weight."""

    parts: Annotated[
        dict[str, Part], Option("by name: {weight: its share, above 0, source: a source}")
    ] = field(default_factory=dict)

    def documents(self) -> Iterable[Document]:
        return (document for _, document in self.grouped("part"))

    def grouped(self, field: str) -> Iterable[tuple[str, Document]]:
        if field != "part":
            raise UserError(f"group_by={field}: a mixture has one field to group by, part")
        if not self.parts:
            raise UserError("a mixture needs parts: calibration.parts.<name>={weight:…,source:…}")
        weights = {name: part["weight"] for name, part in self.parts.items()}
        if min(weights.values()) <= 0:
            raise UserError(f"the weights of a mixture must be above 0, got {weights}")
        if self.group is not None:
            if self.group not in self.parts:
                raise UserError(f"group={self.group}: by part there are {', '.join(self.parts)}")
            weights = {self.group: 1}
        total = sum(weights.values())
        drawn: list[tuple[str, Document]] = []
        for name, weight in weights.items():
            source = self.parts[name]["source"]
            share = round(self.num_samples * weight / total)
            share += share // 4 if self.skip_long else 0  # some will turn out too long
            documents = itertools.islice(filter(has_text, source.documents()), share + 1)
            drawn.extend((name, document) for document in documents)
        random.Random(self.seed).shuffle(drawn)
        return drawn

    def describe(self) -> str:
        return "the mixture of " + ", ".join(self.parts)

    def sources(self) -> tuple[str, ...]:
        return tuple(name for part in self.parts.values() for name in part["source"].sources())
