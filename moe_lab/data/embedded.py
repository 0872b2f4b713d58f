"""Text that needs no download: the running Python's standard library, and generated sheets."""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from moe_lab.data import standard_library
from moe_lab.data.source import Document, Pair, Source
from moe_lab.option import Option
from moe_lab.types import UserError


@functools.cache
def standard_library_fingerprint(split: str) -> str:
    """12 hex over all embedded text of a split, which differs between versions of Python."""
    passages = [standard_library.passages(domain, split) for domain in standard_library.DOMAINS]
    return hashlib.sha256(json.dumps(passages).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class StandardLibrary(Source):
    """The embedded text: the running interpreter's standard library and generated sheets.

    Without domains it is all of them, in training's mixture.
    """

    split: Annotated[str, Option("which part", among=standard_library.SPLITS)] = "train"
    domains: Annotated[
        tuple[str, ...],
        Option("kinds of text, none for all", among=standard_library.DOMAINS),
    ] = ()

    def documents(self) -> Iterable[Document]:
        domains = self.domains or standard_library.DOMAINS
        passages = [p for domain in domains for p in standard_library.passages(domain, self.split)]
        if not self.domains and self.num_samples <= len(passages):
            return standard_library.mixture(self.split, self.num_samples, self.seed)
        random.Random(self.seed).shuffle(passages)
        return passages

    def grouped(self, field: str) -> Iterable[tuple[str, Document]]:
        _check_domain(field, self.group, self.domains or standard_library.DOMAINS)
        source = self if self.group is None else replace(self, domains=(self.group,))
        domains = source.domains or standard_library.DOMAINS
        domain_of: dict[Document, str] = {
            one: domain
            for domain in domains
            for one in standard_library.passages(domain, self.split)
        }
        return ((domain_of[document], document) for document in source.documents())

    def describe(self) -> str:
        return f"the standard library's {self.split} split"


@dataclass(frozen=True)
class StandardQuestions(Source):
    """Questions with their answers, from the embedded text's generated sheets.

    Those of several domains come in equal parts.
    """

    split: Annotated[str, Option("which part", among=standard_library.SPLITS)] = "train"
    domains: Annotated[
        tuple[str, ...],
        Option("kinds of questions, none for all", among=standard_library.QUESTION_DOMAINS),
    ] = ()

    def documents(self) -> Iterable[Document]:
        return (document for _, document in self.grouped("domain"))

    def grouped(self, field: str) -> Iterable[tuple[str, Document]]:
        domains = self.domains or standard_library.QUESTION_DOMAINS
        _check_domain(field, self.group, domains)
        by_domain = [
            [(domain, Pair(*one)) for one in standard_library.questions(domain, self.split)]
            for domain in domains
        ]
        for questions in by_domain:
            random.Random(self.seed).shuffle(questions)
        return (question for turn in zip(*by_domain, strict=False) for question in turn)

    def describe(self) -> str:
        return f"the standard questions' {self.split} split"


def _check_domain(field: str, group: str | None, domains: Sequence[str]) -> None:
    if field != "domain":
        raise UserError(f"group_by={field}: the embedded text has one field to group by, domain")
    if group is not None and group not in domains:
        raise UserError(f"group={group}: by domain there are {', '.join(domains)}")
