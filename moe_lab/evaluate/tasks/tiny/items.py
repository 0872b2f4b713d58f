"""Items of the tiny tasks, drawn from the test split of the embedded text."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from moe_lab.data import standard_library
from moe_lab.files import PACKAGE

NUM_CHOICES = 4
CONTEXT_TOKENS = 32
# Longer pieces differ more in how common they are than in how well they fit.
CONTINUATION_TOKENS = 2
RECALL_PAIRS = 4
ARITHMETIC_EXAMPLES = 3
# Distances of wrong results from the right one: slips in one digit or in the carry.
ARITHMETIC_SLIPS = (-20, -11, -10, -9, -2, -1, 1, 2, 9, 10, 11, 20)
# Distractors come from this many spans whose words are about as frequent as the right one's, so
# that how common a continuation is says little about whether it is right.
SIMILAR_SPANS = 12
TOKENIZER = PACKAGE / "checkpoints" / "tiny_deepseek" / "tokenizer.json"

Item = dict[str, Any]


def multiple_choice(domain: str, num_items: int, seed: int, split: str = "test") -> list[Item]:
    """Items with `context`, four `choices` of equal token length and the `answer`'s position.

    Answer positions are balanced over the items. Raises ValueError for an unknown domain or split.
    """
    standard_library.documents(domain, split)  # names what exists if the domain or split does not
    makers: dict[str, Callable[[str, random.Random, int], list[Item]]] = {
        "arithmetic": _arithmetic,
        "recall": _recall,
    }
    generator = random.Random(f"{domain}/{split}/{seed}")
    if domain in makers:
        return makers[domain](split, generator, num_items)
    return _continuations(domain, split, generator, num_items)


def generative(domain: str, num_items: int, seed: int, split: str = "test") -> list[Item]:
    """The items of `multiple_choice` with `context` and the `answer`'s own text, without choices.

    Raises ValueError for a domain whose questions have no answer of their own.
    """
    if domain not in standard_library.QUESTION_DOMAINS:
        raise ValueError(f"{domain!r} asks no questions: {standard_library.QUESTION_DOMAINS} do")
    return [
        {"context": item["context"], "answer": item["choices"][item["answer"]].strip()}
        for item in multiple_choice(domain, num_items, seed, split)
    ]


def perplexity_passages(
    domain: str, num_passages: int, seed: int, split: str = "test"
) -> list[Item]:
    """Passages with their `text`, without repetition while there are enough."""
    pool = standard_library.passages(domain, split)
    generator = random.Random(f"perplexity/{domain}/{split}/{seed}")
    generator.shuffle(pool)
    return [{"text": pool[index % len(pool)]} for index in range(num_passages)]


def _item(context: str, right: str, wrong: list[str], position: int) -> Item:
    answer = position % NUM_CHOICES
    choices = [*wrong[:answer], right, *wrong[answer:]]
    return {"context": context, "choices": choices, "answer": answer}


def _arithmetic(split: str, generator: random.Random, num_items: int) -> list[Item]:
    problems = standard_library.problems(split)
    generator.shuffle(problems)
    items: list[Item] = []
    for number in range(num_items):
        left, operator, right, result = problems[number % len(problems)]
        others = generator.sample(problems, ARITHMETIC_EXAMPLES)
        lines = [f"{a}{sign}{b}={c}" for a, sign, b, c in others if c != result]
        context = "\n".join([*lines, f"{left}{operator}{right}="])
        slips = [result + slip for slip in ARITHMETIC_SLIPS if result + slip >= 0]
        slips = [slip for slip in slips if len(str(slip)) == len(str(result))]
        wrong = [str(slip) for slip in generator.sample(slips, NUM_CHOICES - 1)]
        items.append(_item(context, str(result), wrong, number))
    return items


def _recall(split: str, generator: random.Random, num_items: int) -> list[Item]:
    """A list of pairs, then one key with the sign that asks for its value's partner.

    The wrong choices are the listed value itself and the partners of two other listed values.
    """
    items: list[Item] = []
    while len(items) < num_items:
        pairs = standard_library.recall_pairs(generator, RECALL_PAIRS)
        partners = {key: standard_library.partner(value) for key, value in pairs.items()}
        if not set(partners.values()).isdisjoint(pairs.values()):
            continue  # a listed value would also be another one's partner
        asked, *others = generator.sample(list(pairs), NUM_CHOICES - 1)
        wrong = [f" {pairs[asked]}", *(f" {partners[key]}" for key in others)]
        generator.shuffle(wrong)
        lines = [f"{key} {value}" for key, value in pairs.items()]
        context = "\n".join([*lines, f"{standard_library.PARTNER_SIGN}{asked}"])
        items.append(_item(context, f" {partners[asked]}", wrong, len(items)))
    return items


@dataclass(frozen=True)
class _Span:
    """A piece of a document that begins and ends at word boundaries."""

    start: int  # first token
    continuation: str
    frequency: float  # mean logarithm of its tokens' counts in the split


@dataclass(frozen=True)
class _Source:
    """A tokenized document and the spans of `CONTINUATION_TOKENS` tokens in it."""

    document: str
    offsets: list[tuple[int, int]]
    spans: list[_Span]


def _continuations(domain: str, split: str, generator: random.Random, num_items: int) -> list[Item]:
    """Which of four pieces of the same document comes next."""
    sources = _sources(domain, split)
    weights = [len(source.spans) for source in sources]
    items: list[Item] = []
    while len(items) < num_items:
        source = generator.choices(sources, weights)[0]
        span = generator.choice(source.spans)
        context = _context(source, span)
        wrong = _distractors(source, span, generator)
        if context and len(wrong) == NUM_CHOICES - 1:
            items.append(_item(context, span.continuation, wrong, len(items)))
    return items


def _context(source: _Source, span: _Span) -> str:
    """Up to `CONTEXT_TOKENS` tokens before a span, from a word boundary; empty if too few."""
    start = span.start - CONTEXT_TOKENS
    while start >= 0 and start < span.start and not _is_boundary(source, start):
        start += 1
    if start < 0 or start == span.start:
        return ""
    return source.document[source.offsets[start][0] : source.offsets[span.start][0]].lstrip()


def _distractors(source: _Source, right: _Span, generator: random.Random) -> list[str]:
    """Continuations of other spans of the document that are about as frequent as the right one."""
    nearby = CONTEXT_TOKENS + CONTINUATION_TOKENS
    others: dict[str, float] = {}
    for span in source.spans:
        same_kind = span.continuation[0] == right.continuation[0]
        if same_kind and abs(span.start - right.start) > nearby:
            others[span.continuation] = abs(span.frequency - right.frequency)
    others.pop(right.continuation, None)
    similar = sorted(others, key=lambda continuation: (others[continuation], continuation))
    similar = similar[:SIMILAR_SPANS]
    return generator.sample(similar, min(NUM_CHOICES - 1, len(similar)))


def _is_boundary(source: _Source, index: int) -> bool:
    """Whether token `index` begins with white space that follows a visible character."""
    start = source.offsets[index][0]
    return (
        start > 0
        and source.document[start].isspace()
        and not (source.document[start - 1].isspace())
    )


@cache
def _sources(domain: str, split: str) -> list[_Source]:
    """Tokenized documents of a domain that hold enough spans to draw distractors from."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    documents = standard_library.documents(domain, split)
    encodings = tokenizer.encode_batch(documents, add_special_tokens=False)
    counts = Counter(token for encoding in encodings for token in encoding.ids)
    sources = []
    for document, encoding in zip(documents, encodings, strict=True):
        source = _Source(document, encoding.offsets, [])
        logarithms = [math.log(counts[token]) for token in encoding.ids]
        boundaries = [i for i in range(len(logarithms)) if _is_boundary(source, i)]
        ends = set(boundaries)
        for start in boundaries:
            stop = start + CONTINUATION_TOKENS
            if stop in ends:
                piece = document[source.offsets[start][0] : source.offsets[stop][0]]
                frequency = sum(logarithms[start:stop]) / CONTINUATION_TOKENS
                source.spans.append(_Span(start, piece, frequency))
        if len(source.spans) > SIMILAR_SPANS * NUM_CHOICES:
            sources.append(source)
    return sources
