"""Text that needs no download: the running Python's standard library, and generated sheets."""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from moe_lab.data import standard_library
from moe_lab.data.source import Document, Pair, Texts
from moe_lab.types import UserError


@functools.cache
def standard_library_fingerprint(split: str) -> str:
    """12 hex over all embedded text of a split, which differs between versions of Python."""
    passages = [standard_library.passages(domain, split) for domain in standard_library.DOMAINS]
    return hashlib.sha256(json.dumps(passages).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class StandardLibrary(Texts):
    """The embedded text: the running interpreter's standard library and generated sheets.

    domains: which of prose, code, arithmetic, recall; by default all, in training's mixture.
    """

    split: str = "train"
    domains: tuple[str, ...] = ()

    def documents(self) -> Iterable[Document]:
        domains = self.domains or standard_library.DOMAINS
        try:
            passages = [
                p for domain in domains for p in standard_library.passages(domain, self.split)
            ]
        except ValueError as error:
            raise UserError(str(error)) from error
        if not self.domains and self.num_samples <= len(passages):
            return standard_library.mixture(self.split, self.num_samples, self.seed)
        random.Random(self.seed).shuffle(passages)
        return passages

    def grouped(self, field: str) -> Iterable[tuple[str, Document]]:
        _check_domain(field, self.group, self.domains or standard_library.DOMAINS)
        source = self if self.group is None else replace(self, domains=(self.group,))
        domains = source.domains or standard_library.DOMAINS
        documents = source.documents()  # first: it refuses what does not exist
        domain_of: dict[Document, str] = {
            one: domain
            for domain in domains
            for one in standard_library.passages(domain, self.split)
        }
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
        domains = self.domains or standard_library.QUESTION_DOMAINS
        _check_domain(field, self.group, domains)
        try:
            by_domain = [
                [
                    (domain, Pair(*question))
                    for question in standard_library.questions(domain, self.split)
                ]
                for domain in domains
            ]
        except ValueError as error:
            raise UserError(str(error)) from error
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
