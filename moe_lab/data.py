"""Calibration, tuning and held-out text: where documents come from, and how they become samples.

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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from moe_lab import text
from moe_lab.tokens import Tokens, chunks
from moe_lab.types import UserError

logger = logging.getLogger(__name__)

LOSS_ON = ("answer", "all")


class Pair(NamedTuple):
    """A document of two parts; the answer continues the prompt as it is, space included."""

    prompt: str
    answer: str


Document = str | Pair


class Sample(NamedTuple):
    """ids, how many of them are the prompt's (all, where it is too long), and the group's name."""

    ids: tuple[int, ...]
    prompt: int = 0
    group: str = ""


@dataclass(frozen=True)
class Texts:
    """A source of documents: subclasses say where `documents` come from.

    num_samples: how many samples; max_length: their tokens at most; pack: join documents and cut
    them into full samples instead; seed: of the choice of documents, where there is one.
    Of prompts with answers, loss_on: what is learned, "answer" or "all"; skip_long: leave out
    those whose prompt alone fills max_length, where otherwise they are refused.
    group_by: a field that gives each sample its group (num_samples counts all groups together);
    group: take only the samples of this one.
    """

    num_samples: int
    max_length: int
    pack: bool = False
    seed: int = 0
    loss_on: str = "answer"
    skip_long: bool = False
    group_by: str | None = None
    group: str | None = None

    def __post_init__(self) -> None:
        for name in ("num_samples", "max_length"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.loss_on not in LOSS_ON:
            raise UserError(f"loss_on={self.loss_on}: there are {', '.join(LOSS_ON)}")
        if self.group is not None and self.group_by is None:
            raise UserError(f"group={self.group} needs the field that says it: group_by=<field>")
        if self.group_by is not None and self.pack:
            raise UserError(
                f"group_by={self.group_by} with pack=true: a packed sample can hold documents of "
                "several groups; set pack=false"
            )

    def documents(self) -> Iterable[Document]:
        """The documents, in order; may be endless."""
        raise NotImplementedError

    def grouped(self, field: str) -> Iterable[tuple[str, Document]]:
        """The documents, each after the name of its group by `field`; UserError without such."""
        raise UserError(f"group_by={field}: {self.describe()} has no fields")

    def _wanted(self) -> Iterator[tuple[str, Document]]:
        """The documents with text, of the group that was asked for, each after its group."""
        if self.group_by is None:
            rows = (("", document) for document in self.documents())
        else:
            rows = self.grouped(self.group_by)
        others = set()
        none = True
        for group, document in rows:
            if self.group is not None and group != self.group:
                others.add(group)
            elif _whole(document).strip():
                none = False
                yield group, document
        if self.group is not None and none:
            raise UserError(
                f"group={self.group}: {self.describe()} has no text of it; by {self.group_by} "
                f"there are {', '.join(sorted(others))}"
            )

    def tokens(self, tokenizer: Any) -> Tokens:
        """The samples; UserError where the source holds too few documents or tokens."""
        samples = (self._packed if self.pack else self._each)(self._wanted(), tokenizer)
        found: list[Sample] = []
        skipped = 0
        while len(found) < self.num_samples and (sample := next(samples, None)):
            if sample.prompt < len(sample.ids):
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
        prompts = tuple(sample.prompt for sample in found)
        has_groups = self.group_by is not None and self.group is None
        return Tokens(
            tuple(sample.ids for sample in found),
            tokenizer.eos_token_id or 0 if pad_id is None else pad_id,
            prompts if any(prompts) and self.loss_on == "answer" else (),
            tuple(sample.group for sample in found) if has_groups else (),
        )

    def describe(self) -> str:
        """The source in words, for messages."""
        return type(self).__name__

    def sources(self) -> tuple[str, ...]:
        """Each source with its split, in words: what a model has seen after training on it."""
        return (self.describe(),)

    def _each(self, rows: Iterable[tuple[str, Document]], tokenizer: Any) -> Iterator[Sample]:
        """A sample of each document."""
        for chunk in chunks(rows, 64):
            limits = dict(truncation=True, max_length=self.max_length)
            encoded = tokenizer([_whole(document) for _, document in chunk], **limits)["input_ids"]
            for (group, document), ids in zip(chunk, encoded, strict=True):
                prompt = _prompt_length(document, ids, tokenizer)
                if isinstance(document, Pair) and prompt == len(ids) and not self.skip_long:
                    self._refuse_long(document, tokenizer)
                if len(ids) > 1:
                    yield Sample(tuple(ids), prompt, group)

    def _refuse_long(self, document: Pair, tokenizer: Any) -> None:
        length = len(tokenizer(document.prompt)["input_ids"])
        raise UserError(
            f"a prompt of {self.describe()} has {length} tokens, so that max_length="
            f"{self.max_length} leaves nothing of its answer to learn: ask for more "
            f"(max_length={length + 1} or above), or leave such samples out (skip_long=true). "
            f"It begins {document.prompt[:60]!r}"
        )

    def _packed(self, rows: Iterable[tuple[str, Document]], tokenizer: Any) -> Iterator[Sample]:
        rest: list[int] = []
        for chunk in chunks((document for _, document in rows), 64):
            if any(isinstance(document, Pair) for document in chunk):
                raise UserError("pack=true would cut prompts from their answers: set pack=false")
            for ids in tokenizer(chunk)["input_ids"]:
                rest.extend(ids)
                while len(rest) >= self.max_length:
                    yield Sample(tuple(rest[: self.max_length]))
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

    def grouped(self, field: str) -> Iterable[tuple[str, Document]]:
        _check_domain(field, self.group, self.domains or text.DOMAINS)
        source = self if self.group is None else replace(self, domains=(self.group,))
        domains = source.domains or text.DOMAINS
        documents = source.documents()  # first: it refuses what does not exist
        domain_of = {one: domain for domain in domains for one in text.passages(domain, self.split)}
        return ((domain_of[document], document) for document in documents)

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
        return (document for _, document in self.grouped("domain"))

    def grouped(self, field: str) -> Iterable[tuple[str, Document]]:
        domains = self.domains or text.QUESTION_DOMAINS
        _check_domain(field, self.group, domains)
        try:
            found = [
                [(domain, Pair(*question)) for question in text.questions(domain, self.split)]
                for domain in domains
            ]
        except ValueError as error:
            raise UserError(str(error)) from error
        for questions in found:
            random.Random(self.seed).shuffle(questions)
        return (question for turn in zip(*found, strict=False) for question in turn)

    def describe(self) -> str:
        return f"the standard questions' {self.split} split"


def _check_domain(field: str, group: str | None, domains: Sequence[str]) -> None:
    if field != "domain":
        raise UserError(f"group_by={field}: the embedded text has one field to group by, domain")
    if group is not None and group not in domains:
        raise UserError(f"group={group}: by domain there are {', '.join(domains)}")


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
        return (self._document(place, row) for place, row in self.rows())

    def grouped(self, field: str) -> Iterable[tuple[str, Document]]:
        for place, row in self.rows():
            if not isinstance(row, dict) or row.get(field) is None:
                raise UserError(
                    f"group_by={field}: {place} has a row without it; there is {_fields(row)}"
                )
            yield str(row[field]), self._document(place, row)

    def _document(self, place: str, row: Any) -> Document:
        if self.prompt is not None:
            return self._pair(place, row)
        if self.template is not None:
            return _fill(self.template, place, row)
        if isinstance(row, dict) and isinstance(row.get(self.field), str):
            return row[self.field]
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
                cache_dir=_cache_of(Path(self.path)),
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


def _cache_of(folder: Path) -> str | None:
    """Where `datasets` keeps what it made of a local folder; None, its own place, for the hub's.

    It knows a folder by its name and would give old rows for new files (datasets 5.2), so each
    state of a folder has a place of its own.
    """
    if not folder.is_dir():
        return None
    import datasets

    files = sorted(path for path in folder.resolve().rglob("*") if path.is_file())
    state = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    digest = hashlib.sha256(json.dumps(state).encode()).hexdigest()[:12]
    return str(Path(datasets.config.HF_DATASETS_CACHE) / f"folder_{digest}")


@dataclass(frozen=True)
class Mixture(Texts):
    """Several sources by weight: `parts` maps a name to {weight: ..., source: a Texts}."""

    parts: dict[str, Any] = None  # type: ignore[assignment]

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
            documents = itertools.islice(source.documents(), share + 1)
            drawn.extend((name, document) for document in documents)
        random.Random(self.seed).shuffle(drawn)
        return drawn

    def describe(self) -> str:
        return "the mixture of " + ", ".join(self.parts)

    def sources(self) -> tuple[str, ...]:
        return tuple(name for part in self.parts.values() for name in part["source"].sources())
