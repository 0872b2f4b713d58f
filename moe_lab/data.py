"""Calibration, tuning and held-out text as token batches, with fingerprints.

One document is one sample, truncated to `max_length` tokens and never packed unless `pack` is set.
A document may also be a prompt with its answer, of which only the answer is learned.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import logging
import random
import string
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_lab import text
from moe_lab.types import UserError

logger = logging.getLogger(__name__)

IGNORED = -100  # the label of a token that is no target: padding, or part of a prompt
LOSS_ON = ("answer", "all")


class Pair(NamedTuple):
    """A document of two parts; the answer continues the prompt as it is, space included."""

    prompt: str
    answer: str


Document = str | Pair


@dataclass(frozen=True)
class Tokens:
    """Samples as token ids. pad_id fills batches on the right, where the attention mask is 0.

    prompts: how many leading tokens of each sample are given and no targets; empty where all are
    targets.
    """

    samples: tuple[tuple[int, ...], ...]
    pad_id: int
    prompts: tuple[int, ...] = ()

    @property
    def fingerprint(self) -> str:
        """12 hex over the token ids, and what of them is no target."""
        values = [self.samples, self.prompts] if self.prompts else self.samples
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

    def batches(self, batch_size: int, device: str = "cpu") -> list[dict[str, Tensor]]:
        """input_ids and attention_mask [B, L], samples of similar length together."""
        return [
            {key: value.to(device) for key, value in self.pad(rows).items()}
            for rows in _grouped(self.by_length().samples, batch_size)
        ]

    def take(self, positions: Iterable[int]) -> Tokens:
        """The samples at these positions, in that order."""
        positions = list(positions)
        samples = tuple(self.samples[position] for position in positions)
        prompts = tuple(self.prompts[position] for position in positions) if self.prompts else ()
        return Tokens(samples, self.pad_id, prompts)

    def shuffled(self, seed: int) -> Tokens:
        """The same samples in another order."""
        positions = list(range(len(self.samples)))
        random.Random(seed).shuffle(positions)
        return self.take(positions)

    def by_length(self) -> Tokens:
        """The same samples, short ones first."""
        return self.take(sorted(range(len(self.samples)), key=lambda i: len(self.samples[i])))

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


@dataclass(frozen=True)
class Texts:
    """A source of documents: subclasses say where `documents` come from.

    num_samples: how many samples; max_length: their tokens at most; pack: join documents and cut
    them into full samples instead; seed: of the choice of documents, where there is one.
    Of prompts with answers, loss_on: what is learned, "answer" or "all"; skip_long: leave out
    those whose prompt alone fills max_length, where otherwise they are refused.
    """

    num_samples: int
    max_length: int
    pack: bool = False
    seed: int = 0
    loss_on: str = "answer"
    skip_long: bool = False

    def __post_init__(self) -> None:
        for name in ("num_samples", "max_length"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.loss_on not in LOSS_ON:
            raise UserError(f"loss_on={self.loss_on}: there are {', '.join(LOSS_ON)}")

    def documents(self) -> Iterable[Document]:
        """The documents, in order; may be endless."""
        raise NotImplementedError

    def tokens(self, tokenizer: Any) -> Tokens:
        """The samples; UserError where the source holds too few documents or tokens."""
        documents = (document for document in self.documents() if _whole(document).strip())
        samples = (
            self._packed(documents, tokenizer) if self.pack else self._each(documents, tokenizer)
        )
        found: list[tuple[tuple[int, ...], int]] = []
        skipped = 0
        while len(found) < self.num_samples and (sample := next(samples, None)):
            ids, prompt = sample
            if prompt < len(ids):
                found.append(sample)
            else:
                skipped += 1
        if skipped:
            logger.info("%s: %d prompts were too long and left out", self.describe(), skipped)
        if len(found) < self.num_samples:
            unit = (
                f"full samples of {self.max_length} tokens" if self.pack else "documents with text"
            )
            raise UserError(
                f"{self.num_samples} samples were asked for, but {self.describe()} holds only "
                f"{len(found)} {unit}; "
                + (f"ask for fewer (num_samples={len(found)}) or " if found else "")
                + "give more text"
            )
        pad_id = tokenizer.pad_token_id
        prompts = tuple(prompt for _, prompt in found)
        return Tokens(
            tuple(ids for ids, _ in found),
            tokenizer.eos_token_id or 0 if pad_id is None else pad_id,
            prompts if any(prompts) and self.loss_on == "answer" else (),
        )

    def describe(self) -> str:
        """The source in words, for messages."""
        return type(self).__name__

    def sources(self) -> tuple[str, ...]:
        """Each source with its split, in words: what a model has seen after training on it."""
        return (self.describe(),)

    def _each(
        self, documents: Iterable[Document], tokenizer: Any
    ) -> Iterator[tuple[tuple[int, ...], int]]:
        """Each sample's ids, and how many of them are its prompt's: all, where it is too long."""
        for group in _grouped(documents, 64):
            limits = dict(truncation=True, max_length=self.max_length)
            encoded = tokenizer([_whole(document) for document in group], **limits)["input_ids"]
            for document, ids in zip(group, encoded, strict=True):
                prompt = _prompt_length(document, ids, tokenizer)
                if isinstance(document, Pair) and prompt == len(ids) and not self.skip_long:
                    self._refuse_long(document, tokenizer)
                if len(ids) > 1:
                    yield tuple(ids), prompt

    def _refuse_long(self, document: Pair, tokenizer: Any) -> None:
        length = len(tokenizer(document.prompt)["input_ids"])
        raise UserError(
            f"a prompt of {self.describe()} has {length} tokens, so that max_length="
            f"{self.max_length} leaves nothing of its answer to learn: ask for more "
            f"(max_length={length + 1} or above), or leave such samples out (skip_long=true). "
            f"It begins {document.prompt[:60]!r}"
        )

    def _packed(
        self, documents: Iterable[Document], tokenizer: Any
    ) -> Iterator[tuple[tuple[int, ...], int]]:
        rest: list[int] = []
        for group in _grouped(documents, 64):
            if any(isinstance(document, Pair) for document in group):
                raise UserError("pack=true would cut prompts from their answers: set pack=false")
            for ids in tokenizer(group)["input_ids"]:
                rest.extend(ids)
                while len(rest) >= self.max_length:
                    yield tuple(rest[: self.max_length]), 0
                    rest = rest[self.max_length :]


def _whole(document: Document) -> str:
    return document if isinstance(document, str) else document.prompt + document.answer


def _prompt_length(document: Document, ids: list[int], tokenizer: Any) -> int:
    """How many of a document's ids its prompt explains.

    A token across the border belongs to the answer; so does everything after the first token that
    the prompt alone would not give, such as the end that some tokenizers add.
    """
    if isinstance(document, str):
        return 0
    alone = tokenizer(document.prompt)["input_ids"]
    same = (a == b for a, b in zip(alone, ids, strict=False))
    return sum(1 for _ in itertools.takewhile(bool, same))


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

    def documents(self) -> Iterable[Document]:
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
class StandardQuestions(Texts):
    """Questions with their answers, from the embedded text's generated sheets.

    domains: arithmetic, recall or both (the default), in equal parts.
    """

    split: str = "train"
    domains: tuple[str, ...] = ()

    def documents(self) -> Iterable[Document]:
        try:
            found = [
                list(text.questions(domain, self.split))
                for domain in self.domains or text.QUESTION_DOMAINS
            ]
        except ValueError as error:
            raise UserError(str(error)) from error
        for questions in found:
            random.Random(self.seed).shuffle(questions)
        return (Pair(*question) for turn in zip(*found, strict=False) for question in turn)

    def describe(self) -> str:
        return f"the standard questions' {self.split} split"


@dataclass(frozen=True)
class Rows(Texts):
    """A source of rows with fields: subclasses say where `rows` come from.

    A row becomes a document by one of: the text in its `field`; `template`, e.g. "{question}"; or
    `prompt` and `answer`, templates of the two parts. `answers`: where rows only number their
    answer, what `answer` gives is looked up here, which gives its template.
    """

    field: str = "text"
    template: str | None = None
    prompt: str | None = None
    answer: str | None = None
    answers: dict[str, str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.prompt is None) != (self.answer is None):
            raise UserError(
                f"prompt={self.prompt!r} and answer={self.answer!r} belong together: give both, as "
                "templates of a row's fields such as '{question}'"
            )

    def rows(self) -> Iterable[tuple[str, Any]]:
        """Where each row lies, for messages, and the row."""
        raise NotImplementedError

    def documents(self) -> Iterable[Document]:
        for place, row in self.rows():
            if self.prompt is not None:
                yield self._pair(place, row)
            elif self.template is not None:
                yield _fill(self.template, place, row)
            elif isinstance(row, dict) and isinstance(row.get(self.field), str):
                yield row[self.field]
            else:
                raise UserError(
                    f"{place} has rows without text in the field {self.field!r} (there is "
                    f"{_fields(row)}); name another with calibration.field=<name>"
                )

    def _pair(self, place: str, row: Any) -> Pair:
        answer = _fill(self.answer, place, row)
        if self.answers is not None:
            templates = {str(key): template for key, template in self.answers.items()}
            if answer not in templates:
                raise UserError(
                    f"{place} has a row whose answer is {answer!r}; answers= knows "
                    f"{', '.join(templates)}"
                )
            answer = _fill(templates[answer], place, row)
        if not answer.strip():
            raise UserError(
                f"{place} has a row without an answer: its fields are {_fields(row)}, and the "
                f"template answer={self.answer!r} gives nothing"
            )
        return Pair(_fill(self.prompt, place, row), answer)


class _Formatter(string.Formatter):
    def format_field(self, value: Any, format_spec: str) -> str:
        if value is None:
            raise TypeError("a field is null")
        return super().format_field(value, format_spec)


def _fill(template: str, place: str, row: Any) -> str:
    try:
        return _Formatter().vformat(template, (), row)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{place} has fields {_fields(row)}, which do not fill the template {template!r}: "
            f"{error!r}"
        ) from error


def _fields(row: Any) -> Any:
    return sorted(row) if isinstance(row, dict) else type(row).__name__


@dataclass(frozen=True)
class Files(Rows):
    """Local files: JSON lines and Parquet (rows with fields) or plain text (one document each).

    A plain text file is one document in the field "text"; blank lines do not separate.
    """

    files: tuple[str, ...] = ()

    def rows(self) -> Iterable[tuple[str, Any]]:
        if not self.files:
            raise UserError("no files were named: calibration.files=[a.jsonl,b.parquet,c.txt]")
        for name in self.files:
            path = Path(name).expanduser()
            if not path.is_file():
                raise UserError(f"{path} is not a file (calibration.files)")
            for row in self._rows_or_refuse(path):
                yield str(path), row

    def _rows_or_refuse(self, path: Path) -> Iterator[Any]:
        try:
            yield from self._read(path)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error

    def _read(self, path: Path) -> Iterator[Any]:
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
class HubDataset(Rows):
    """A dataset of the Hugging Face hub, or a local folder of the same layout, through `datasets`.

    split: also a part of one, such as train[:90%], where it is not streamed.
    """

    path: str = ""
    name: str | None = None
    split: str = "train"
    data_files: str | None = None
    streaming: bool = False

    def rows(self) -> Iterable[tuple[str, Any]]:
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
            yield self.path, row

    def describe(self) -> str:
        parts = (self.path, self.name, self.data_files)
        return f"{'/'.join(part for part in parts if part)} ({self.split})"


@dataclass(frozen=True)
class Mixture(Texts):
    """Several sources by weight: `parts` maps a name to {weight: ..., source: a Texts}."""

    parts: dict[str, Any] = None  # type: ignore[assignment]

    def documents(self) -> Iterable[Document]:
        if not self.parts:
            raise UserError("a mixture needs parts: calibration.parts.<name>={weight:…,source:…}")
        weights = {name: part["weight"] for name, part in self.parts.items()}
        if min(weights.values()) <= 0:
            raise UserError(f"the weights of a mixture must be above 0, got {weights}")
        total = sum(weights.values())
        drawn: list[Document] = []
        for part in self.parts.values():
            share = round(self.num_samples * part["weight"] / total)
            share += share // 4 if self.skip_long else 0  # some will turn out too long
            drawn.extend(itertools.islice(part["source"].documents(), share + 1))
        random.Random(self.seed).shuffle(drawn)
        return drawn

    def describe(self) -> str:
        return "the mixture of " + ", ".join(self.parts)

    def sources(self) -> tuple[str, ...]:
        return tuple(name for part in self.parts.values() for name in part["source"].sources())
