"""Text as token batches, with a fingerprint."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

IGNORED = -100  # the label of a token that is no target: padding, or part of a prompt
Chunked = TypeVar("Chunked")


class Tokenizer(Protocol):
    """What is asked of a tokenizer of transformers."""

    @property
    def pad_token_id(self) -> int | None: ...

    @property
    def eos_token_id(self) -> int | None: ...

    def __call__(self, text: Any, **limits: Any) -> Mapping[str, Any]: ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


def chunks(values: Iterable[Chunked], size: int) -> Iterator[list[Chunked]]:
    """The values in lists of `size`, the last one shorter where they do not fit."""
    iterator = iter(values)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def _cut(
    samples: Iterable[tuple[int, ...]], size: int, num_tokens: int | None
) -> Iterator[list[tuple[int, ...]]]:
    """Samples, short ones first, in lists of at most `size` and, padded, so many tokens."""
    rows: list[tuple[int, ...]] = []
    for sample in samples:
        too_many = num_tokens is not None and (len(rows) + 1) * len(sample) > num_tokens
        if rows and (len(rows) == size or too_many):
            yield rows
            rows = []
        rows.append(sample)
    if rows:
        yield rows


@dataclass(frozen=True)
class Tokens:
    """Samples as token ids. pad_id fills batches on the right, where the attention mask is 0.

    prompts: how many leading tokens of each sample are given and no targets; empty where all are
    targets. groups: the name of each sample's group; empty where none was asked for.
    """

    samples: tuple[tuple[int, ...], ...]
    pad_id: int
    prompts: tuple[int, ...] = ()
    groups: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """12 hex over the token ids, what of them is no target, and the groups."""
        values: object = [self.samples, self.prompts] if self.prompts else self.samples
        if self.groups:
            values = {"samples": values, "groups": self.groups}
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:12]

    @property
    def num_tokens(self) -> int:
        """Valid tokens of all samples."""
        return sum(len(sample) for sample in self.samples)

    @property
    def num_targets(self) -> int:
        """Tokens to be predicted: all but each sample's first and its prompt."""
        prompts = self.prompts or [1] * len(self.samples)
        pairs = zip(self.samples, prompts, strict=True)
        return sum(len(sample) - max(1, prompt) for sample, prompt in pairs)

    def batches(
        self, batch_size: int, device: str = "cpu", num_tokens: int | None = None
    ) -> list[dict[str, Tensor]]:
        """input_ids and attention_mask [B, L], samples of similar length together.

        num_tokens: the most of a batch, padding counted; a longer sample is a batch of its own.
        """
        return [
            {key: value.to(device) for key, value in self.pad(rows).items()}
            for rows in _cut(self.by_length().samples, batch_size, num_tokens)
        ]

    def take(self, positions: Iterable[int]) -> Tokens:
        """The samples at these positions, in that order."""
        positions = list(positions)
        samples = tuple(self.samples[position] for position in positions)
        prompts = tuple(self.prompts[position] for position in positions) if self.prompts else ()
        groups = tuple(self.groups[position] for position in positions) if self.groups else ()
        return Tokens(samples, self.pad_id, prompts, groups)

    def by_group(self) -> dict[str, Tokens]:
        """The samples of each group, by name in order; all under "" where there are no groups."""
        if not self.groups:
            return {"": self}
        positions: dict[str, list[int]] = {name: [] for name in sorted(set(self.groups))}
        for position, name in enumerate(self.groups):
            positions[name].append(position)
        return {name: self.take(chosen) for name, chosen in positions.items()}

    def shuffled(self, seed: int) -> Tokens:
        """The same samples in another order."""
        positions = list(range(len(self.samples)))
        random.Random(seed).shuffle(positions)
        return self.take(positions)

    def by_length(self) -> Tokens:
        """The same samples, short ones first."""
        return self.take(self.positions_by_length())

    def positions_by_length(self) -> list[int]:
        """Where the samples of `by_length` stand here."""
        return sorted(range(len(self.samples)), key=lambda i: len(self.samples[i]))

    def pad(self, rows: Iterable[tuple[int, ...]]) -> dict[str, Tensor]:
        """One batch of the given samples."""
        rows = list(rows)
        length = max(len(row) for row in rows)
        ids = torch.full((len(rows), length), self.pad_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def labelled(self) -> dict[str, Tensor]:
        """All samples as one batch with `labels` [B, L]: the ids of targets, IGNORED elsewhere."""
        batch = self.pad(self.samples)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
        for row, prompt in enumerate(self.prompts):
            labels[row, :prompt] = IGNORED
        return batch | {"labels": labels}
