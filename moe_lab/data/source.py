"""Calibration, tuning and held-out text: where documents come from, and how they become samples.

One document is one sample, truncated to `max_length` tokens and never packed unless `pack` is set.
A document may also be a prompt with its answer, of which only the answer is learned, or a
conversation, which the tokenizer's chat template writes as text.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

from moe_lab.data.chat import Chat, ChatText, as_text
from moe_lab.data.tokens import Tokenizer, Tokens, chunks
from moe_lab.option import Option, Plugin, check_options
from moe_lab.types import UserError

logger = logging.getLogger(__name__)


class Pair(NamedTuple):
    """A document of two parts; the answer continues the prompt as it is, space included."""

    prompt: str
    answer: str


Document = str | Pair | Chat
LONG, WITHOUT_TEXT = "prompts that were too long", "rows without text (null, empty or blank)"


class Sample(NamedTuple):
    """ids, how many of them are the prompt's (all, where it is too long), and the group's name."""

    ids: tuple[int, ...]
    prompt: int = 0
    group: str = ""


@dataclass(frozen=True)
class Source(Plugin):
    """Where text comes from: the base of all sources, for calibration, tuning and held-out text.

    A source says where its `documents` come from, what it is called (`describe`), and, where they
    have fields, how they are `grouped`; the base makes samples of them (`tokens`). Without
    skip_long a prompt that fills max_length is refused. num_samples counts all groups together.
    """

    num_samples: Annotated[int, Option("how many samples", least=1)]
    max_length: Annotated[int, Option("tokens of a sample at most", least=1)]
    pack: Annotated[bool, Option("join documents and cut them into full samples")] = False
    seed: Annotated[
        int, Option("of the choice of documents, where there is one", least=0, most=2**32 - 1)
    ] = 0
    loss_on: Annotated[
        str, Option("what is learned of prompts with answers", among=("answer", "all"))
    ] = "answer"
    skip_long: Annotated[bool, Option("leave out prompts that alone fill max_length")] = False
    group_by: Annotated[
        str | None, Option("a plan for each value of this field, which groups the samples")
    ] = None
    group: Annotated[str | None, Option("take the samples of this one group alone")] = None

    def __post_init__(self) -> None:
        check_options(self, "calibration")
        if self.group is not None and self.group_by is None:
            raise UserError(f"group={self.group} needs the field that says it: group_by=<field>")
        if self.group_by is not None and self.pack:
            raise UserError(
                f"group_by={self.group_by} with pack=true: a packed sample can hold documents of "
                "several groups; set pack=false"
            )

    def documents(self) -> Iterable[Document]:
        """The documents, in order; may be endless. UserError where they cannot be had."""
        raise NotImplementedError

    def grouped(self, field: str) -> Iterable[tuple[str, Document]]:
        """The documents, each after the name of its group by `field`; UserError without such."""
        raise UserError(f"group_by={field}: {self.describe()} has no fields")

    def _wanted(
        self, tokenizer: Tokenizer, left_out: Counter[str]
    ) -> Iterator[tuple[str, str | Pair]]:
        """The documents with text, of the group that was asked for, each after its group."""
        rows: Iterable[tuple[str, Document]]
        if self.group_by is None:
            rows = (("", document) for document in self.documents())
        else:
            rows = self.grouped(self.group_by)
        others = set()
        none = True
        for group, document in rows:
            if not has_text(document):
                left_out[WITHOUT_TEXT] += 1
            elif self.group is not None and group != self.group:
                others.add(group)
            else:
                none = False
                yield (
                    group,
                    as_text(document, tokenizer) if isinstance(document, Chat) else document,
                )
        if self.group is not None and none:
            raise UserError(
                f"group={self.group}: {self.describe()} has no text of it; by {self.group_by} "
                f"there are {', '.join(sorted(others))}"
            )

    def tokens(self, tokenizer: Tokenizer) -> Tokens:
        """The samples; UserError where the source holds too few documents or tokens."""
        left_out: Counter[str] = Counter()
        rows = self._wanted(tokenizer, left_out)
        samples = (self._packed if self.pack else self._each)(rows, tokenizer)
        chosen: list[Sample] = []
        while len(chosen) < self.num_samples and (sample := next(samples, None)):
            if sample.prompt < len(sample.ids):
                chosen.append(sample)
            else:
                left_out[LONG] += 1
        told = " and ".join(f"{number} {what}" for what, number in left_out.items())
        if told:
            logger.info("%s: left out were %s", self.describe(), told)
        if len(chosen) < self.num_samples:
            unit = (
                f"full samples of {self.max_length} tokens" if self.pack else "documents with text"
            )
            raise UserError(
                f"{self.num_samples} samples were asked for, but {self.describe()} holds only "
                f"{len(chosen)} {unit}; "
                + (f"ask for fewer (num_samples={len(chosen)}) or " if chosen else "")
                + "give more text"
                + (f"; left out were {told}" if told else "")
            )
        pad_id = tokenizer.pad_token_id
        prompts = tuple(sample.prompt for sample in chosen)
        has_groups = self.group_by is not None and self.group is None
        return Tokens(
            tuple(sample.ids for sample in chosen),
            tokenizer.eos_token_id or 0 if pad_id is None else pad_id,
            prompts if any(prompts) and self.loss_on == "answer" else (),
            tuple(sample.group for sample in chosen) if has_groups else (),
        )

    def describe(self) -> str:
        """The source in words, for messages."""
        return type(self).__name__

    def sources(self) -> tuple[str, ...]:
        """Each source with its split, in words: what a model has seen after training on it."""
        return (self.describe(),)

    def _each(
        self, rows: Iterable[tuple[str, str | Pair]], tokenizer: Tokenizer
    ) -> Iterator[Sample]:
        """A sample of each document."""
        for chunk in chunks(rows, 64):
            limits = dict(truncation=True, max_length=self.max_length)
            texts = [whole_text(document) for _, document in chunk]
            encoded = _encoded(texts, tokenizer, limits)
            for (group, document), ids in zip(chunk, encoded, strict=True):
                prompt = _prompt_length(document, ids, tokenizer)
                if isinstance(document, Pair) and prompt == len(ids) and not self.skip_long:
                    self._refuse_long(document, tokenizer)
                if len(ids) > 1:
                    yield Sample(tuple(ids), prompt, group)

    def _refuse_long(self, document: Pair, tokenizer: Tokenizer) -> None:
        length = len(tokenizer(document.prompt)["input_ids"])
        raise UserError(
            f"a prompt of {self.describe()} has {length} tokens, so that max_length="
            f"{self.max_length} leaves nothing of its answer to learn: ask for more "
            f"(max_length={length + 1} or above), or leave such samples out (skip_long=true). "
            f"It begins {document.prompt[:60]!r}"
        )

    def _packed(
        self, rows: Iterable[tuple[str, str | Pair]], tokenizer: Tokenizer
    ) -> Iterator[Sample]:
        rest: list[int] = []
        for chunk in chunks((document for _, document in rows), 64):
            texts = [document for document in chunk if not isinstance(document, Pair)]
            if len(texts) < len(chunk):
                raise UserError("pack=true would cut prompts from their answers: set pack=false")
            for ids in _encoded(texts, tokenizer, {}):
                rest.extend(ids)
                while len(rest) >= self.max_length:
                    yield Sample(tuple(rest[: self.max_length]))
                    rest = rest[self.max_length :]


def whole_text(document: str | Pair) -> str:
    """A document's text, of a prompt with its answer both."""
    return document if isinstance(document, str) else document.prompt + document.answer


def has_text(document: Document) -> bool:
    """Whether a document says anything; messages that say nothing are no conversation."""
    return isinstance(document, Chat) or bool(whole_text(document).strip())


def _encoded(texts: Sequence[str], tokenizer: Tokenizer, limits: dict[str, Any]) -> list[list[int]]:
    """The ids of each; a chat template has written the special tokens already."""
    found: dict[int, list[int]] = {}
    for written in (False, True):
        own = [number for number, text in enumerate(texts) if isinstance(text, ChatText) == written]
        if own:
            extra = {"add_special_tokens": False} if written else {}
            ids = tokenizer([texts[number] for number in own], **limits, **extra)["input_ids"]
            found |= dict(zip(own, ids, strict=True))
    return [found[number] for number in range(len(texts))]


def _prompt_length(document: str | Pair, ids: list[int], tokenizer: Tokenizer) -> int:
    """How many of a document's ids its prompt explains.

    A token across the border belongs to the answer; so does everything after the first token that
    the prompt alone would not give, such as the end that some tokenizers add.
    """
    if isinstance(document, str):
        return 0
    alone = tokenizer(document.prompt)["input_ids"]
    same = (a == b for a, b in zip(alone, ids, strict=False))
    return sum(1 for _ in itertools.takewhile(bool, same))
