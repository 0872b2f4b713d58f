"""Calibration, tuning and held-out text as token batches, with fingerprints.

One document is one sample, truncated to `max_length` tokens and never packed unless `pack` is set.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_lab import text
from moe_lab.types import UserError


@dataclass(frozen=True)
class Tokens:
    """Samples as token ids. pad_id fills batches on the right, where the attention mask is 0."""

    samples: tuple[tuple[int, ...], ...]
    pad_id: int

    @property
    def fingerprint(self) -> str:
        """12 hex over the token ids."""
        return hashlib.sha256(json.dumps(self.samples).encode()).hexdigest()[:12]

    @property
    def num_tokens(self) -> int:
        """Valid tokens of all samples."""
        return sum(len(sample) for sample in self.samples)

    def batches(self, batch_size: int, device: str = "cpu") -> list[dict[str, Tensor]]:
        """input_ids and attention_mask [B, L], samples of similar length together."""
        ordered = sorted(self.samples, key=len)
        return [
            {key: value.to(device) for key, value in self.pad(rows).items()}
            for rows in _grouped(ordered, batch_size)
        ]

    def shuffled(self, seed: int) -> Tokens:
        """The same samples in another order."""
        samples = list(self.samples)
        random.Random(seed).shuffle(samples)
        return Tokens(tuple(samples), self.pad_id)

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


@dataclass(frozen=True)
class Texts:
    """A source of documents: subclasses say where `documents` come from.

    num_samples: how many samples; max_length: their tokens at most; pack: join documents and cut
    them into full samples instead; seed: of the choice of documents, where there is one.
    """

    num_samples: int
    max_length: int
    pack: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_samples", "max_length"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")

    def documents(self) -> Iterable[str]:
        """The documents, in order; may be endless."""
        raise NotImplementedError

    def tokens(self, tokenizer: Any) -> Tokens:
        """The samples; UserError where the source holds too few documents or tokens."""
        documents = (document for document in self.documents() if document.strip())
        samples = (
            self._packed(documents, tokenizer) if self.pack else self._each(documents, tokenizer)
        )
        samples = tuple(itertools.islice(samples, self.num_samples))
        if len(samples) < self.num_samples:
            unit = (
                f"full samples of {self.max_length} tokens" if self.pack else "documents with text"
            )
            raise UserError(
                f"{self.num_samples} samples were asked for, but {self.describe()} holds only "
                f"{len(samples)} {unit}; "
                + (f"ask for fewer (num_samples={len(samples)}) or " if samples else "")
                + "give more text"
            )
        pad_id = tokenizer.pad_token_id
        return Tokens(samples, tokenizer.eos_token_id or 0 if pad_id is None else pad_id)

    def describe(self) -> str:
        """The source in words, for messages."""
        return type(self).__name__

    def _each(self, documents: Iterable[str], tokenizer: Any) -> Iterator[tuple[int, ...]]:
        for group in _grouped(documents, 64):
            encoded = tokenizer(group, truncation=True, max_length=self.max_length)
            yield from (tuple(ids) for ids in encoded["input_ids"] if len(ids) > 1)

    def _packed(self, documents: Iterable[str], tokenizer: Any) -> Iterator[tuple[int, ...]]:
        rest: list[int] = []
        for group in _grouped(documents, 64):
            for ids in tokenizer(group)["input_ids"]:
                rest.extend(ids)
                while len(rest) >= self.max_length:
                    yield tuple(rest[: self.max_length])
                    rest = rest[self.max_length :]


@functools.cache
def standard_library_fingerprint(split: str) -> str:
    """12 hex over all embedded text of a split, which differs between versions of Python."""
    passages = [text.passages(domain, split) for domain in text.DOMAINS]
    return hashlib.sha256(json.dumps(passages).encode()).hexdigest()[:12]


def _grouped(values: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(values)
    while group := list(itertools.islice(iterator, size)):
        yield group


@dataclass(frozen=True)
class StandardLibrary(Texts):
    """The embedded text: the running interpreter's standard library and generated sheets.

    domains: which of prose, code, arithmetic, recall; by default all, in training's mixture.
    """

    split: str = "train"
    domains: tuple[str, ...] = ()

    def documents(self) -> Iterable[str]:
        domains = self.domains or text.DOMAINS
        try:
            found = [p for domain in domains for p in text.passages(domain, self.split)]
        except ValueError as error:
            raise UserError(str(error)) from error
        if not self.domains and self.num_samples <= len(found):
            return text.mixture(self.split, self.num_samples, self.seed)
        random.Random(self.seed).shuffle(found)
        return found

    def describe(self) -> str:
        return f"the standard library's {self.split} split"


@dataclass(frozen=True)
class Files(Texts):
    """Local files: JSON lines and Parquet (the column `field`) or plain text (one document each).

    A plain text file is one document; blank lines do not separate.
    """

    files: tuple[str, ...] = ()
    field: str = "text"

    def documents(self) -> Iterable[str]:
        if not self.files:
            raise UserError("no files were named: calibration.files=[a.jsonl,b.parquet,c.txt]")
        for name in self.files:
            yield from self._read(Path(name).expanduser())

    def _read(self, path: Path) -> Iterable[str]:
        if not path.is_file():
            raise UserError(f"{path} is not a file (calibration.files)")
        for row in self._rows_or_refuse(path):
            if not isinstance(row, dict) or not isinstance(row.get(self.field), str):
                fields = sorted(row) if isinstance(row, dict) else type(row).__name__
                raise UserError(
                    f"{path} has rows without text in the field {self.field!r} (there is "
                    f"{fields}); name another with calibration.field=<name>"
                )
            yield row[self.field]

    def _rows_or_refuse(self, path: Path) -> Iterator[Any]:
        try:
            yield from self._rows(path)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error

    def _rows(self, path: Path) -> Iterator[Any]:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
                yield from batch.to_pylist()
        elif path.suffix in (".jsonl", ".json"):
            # Not str.splitlines, which also splits at U+2028 inside a JSON string.
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield _json_line(line, number)
        else:
            yield {self.field: path.read_text(encoding="utf-8")}

    def describe(self) -> str:
        return ", ".join(self.files)


def _json_line(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number} is not JSON ({error}); one object a line") from error


@dataclass(frozen=True)
class HubDataset(Texts):
    """A dataset of the Hugging Face hub, or a local folder of the same layout, through `datasets`.

    template: how a row becomes a document, e.g. "{question}"; default the column `field`.
    """

    path: str = ""
    name: str | None = None
    split: str = "train"
    field: str = "text"
    template: str | None = None
    data_files: str | None = None
    streaming: bool = False

    def documents(self) -> Iterable[str]:
        import datasets

        try:
            rows = datasets.load_dataset(
                self.path,
                self.name,
                split=self.split,
                data_files=self.data_files,
                streaming=self.streaming,
            )
        except Exception as error:  # datasets raises many kinds; each means: not to be had
            raise UserError(
                f"the dataset {self.path!r} could not be loaded: {error}. Without a network give a "
                "local folder of the same layout (calibration.path=<folder>), or calibration=files"
            ) from error
        for row in rows:
            yield self._document(row)

    def _document(self, row: dict[str, Any]) -> str:
        if self.template is None and not isinstance(row.get(self.field), str):
            raise UserError(
                f"{self.path} has no text in the column {self.field!r}; its columns are "
                f"{sorted(row)}: name another with calibration.field=<name>"
            )
        try:
            return row[self.field] if self.template is None else self.template.format(**row)
        except (KeyError, IndexError, TypeError) as error:
            raise UserError(
                f"{self.path} has columns {sorted(row)}, which do not fill the template "
                f"{self.template!r}: {error!r}"
            ) from error

    def describe(self) -> str:
        return f"{self.path} ({self.split})"


@dataclass(frozen=True)
class Mixture(Texts):
    """Several sources by weight: `parts` maps a name to {weight: ..., source: a Texts}."""

    parts: dict[str, Any] = None  # type: ignore[assignment]

    def documents(self) -> Iterable[str]:
        if not self.parts:
            raise UserError("a mixture needs parts: calibration.parts.<name>={weight:…,source:…}")
        weights = {name: part["weight"] for name, part in self.parts.items()}
        if min(weights.values()) <= 0:
            raise UserError(f"the weights of a mixture must be above 0, got {weights}")
        total = sum(weights.values())
        drawn: list[str] = []
        for part in self.parts.values():
            share = round(self.num_samples * part["weight"] / total)
            drawn.extend(itertools.islice(part["source"].documents(), share + 1))
        random.Random(self.seed).shuffle(drawn)
        return drawn

    def describe(self) -> str:
        return "the mixture of " + ", ".join(self.parts)
