"""Rows of tokens that the reference model trains and validates on."""

from __future__ import annotations

import random
from itertools import chain

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from moe_lab.data import standard_library

# Generated documents only make sense from their start; long texts may be cut anywhere.
ALIGNED_DOMAINS = ("arithmetic", "recall")
TOKENIZED_AT_ONCE = 2_000


def tokenize(tokenizer: PreTrainedTokenizerFast, domain: str, split: str) -> list[list[int]]:
    """Token numbers of every document, without special tokens."""
    found: list[list[int]] = []
    documents = standard_library.documents(domain, split)
    for start in range(0, len(documents), TOKENIZED_AT_ONCE):
        batch = documents[start : start + TOKENIZED_AT_ONCE]
        found.extend(tokenizer(batch, add_special_tokens=False)["input_ids"])
    return found


class Rows:
    """An endless, seeded stream of rows of one domain; shape of a row: [row_length].

    Every row begins with the beginning-of-sequence token, as every evaluated text does.
    """

    def __init__(
        self,
        documents: list[list[int]],
        domain: str,
        row_length: int,
        bos: int,
        eos: int,
        seed: int,
    ) -> None:
        self.documents = documents
        self.aligned = domain in ALIGNED_DOMAINS
        self.row_length = row_length
        self.bos = bos
        self.eos = eos
        self.generator = random.Random(f"rows/{domain}/{seed}")
        self.pending: list[Tensor] = []

    def take(self, count: int) -> Tensor:
        """The next `count` rows, shape [count, row_length]."""
        while len(self.pending) < count:
            self.pending.extend(self.epoch().unbind(0))
        taken, self.pending = self.pending[:count], self.pending[count:]
        return torch.stack(taken)

    def epoch(self) -> Tensor:
        """All documents once, as shuffled rows [count, row_length]."""
        order = self.generator.sample(self.documents, len(self.documents))
        rows = self._aligned(order) if self.aligned else self._packed(order)
        return rows[torch.tensor(self.generator.sample(range(len(rows)), len(rows)))]

    def _packed(self, documents: list[list[int]]) -> Tensor:
        """Documents one after the other, cut every row_length - 1 tokens at a random offset."""
        stream = list(chain.from_iterable([*document, self.eos] for document in documents))
        width = self.row_length - 1
        offset = self.generator.randrange(min(width, max(1, len(stream) - width)))
        count = (len(stream) - offset) // width
        rows = torch.tensor(stream[offset : offset + count * width]).view(count, width)
        return torch.cat((torch.full((count, 1), self.bos), rows), dim=1)

    def _aligned(self, documents: list[list[int]]) -> Tensor:
        """Rows that begin where a document begins and are filled with the following ones."""
        rows = []
        row: list[int] = []
        for document in documents:
            row += [self.bos, *document, self.eos]
            if len(row) >= self.row_length:
                rows.append(row[: self.row_length])
                row = []
        return torch.tensor(rows)


def rows_of(
    tokenizer: PreTrainedTokenizerFast, split: str, row_length: int, seed: int
) -> dict[str, Rows]:
    """One stream of rows per domain."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return {
        domain: Rows(tokenize(tokenizer, domain, split), domain, row_length, bos, eos, seed)
        for domain in standard_library.DOMAINS
    }


def mixed_batch(streams: dict[str, Rows], count: int, generator: random.Random) -> Tensor:
    """`count` rows whose domains are drawn by `text.MIXTURE`, shape [count, row_length]."""
    names = generator.choices(
        list(standard_library.MIXTURE), list(standard_library.MIXTURE.values()), k=count
    )
    return torch.cat([streams[name].take(names.count(name)) for name in sorted(set(names))])
