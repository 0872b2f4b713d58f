"""Text for calibration, training and evaluation, read or generated at run time.

Prose and code come from the running interpreter's standard library, so no text is copied into
this repository; arithmetic and recall are generated from seeds. A document (a module, a topic,
a generated sheet) belongs to exactly one split.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import os
import random
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from moe_lab.data.kept_text import kept_by_source

DOMAINS = ("prose", "code", "arithmetic", "recall")
SPLITS = ("train", "validation", "test")
LIBRARY_DOMAINS = ("prose", "code")
QUESTION_DOMAINS = ("arithmetic", "recall")
# Share of tokens per domain in training; `mixture` draws samples of similar length by it.
MIXTURE: dict[str, float] = {"prose": 0.25, "code": 0.2, "arithmetic": 0.25, "recall": 0.3}

PASSAGE_CHARACTERS = 450  # 100-250 tokens of the reference tokenizer
MINIMUM_CHARACTERS = 80  # shorter remains of a cut document say too little to be a sample
PARTNER_SIGN = "?"  # before the key of a recall question that asks for the value's partner
GENERATED_DOCUMENTS = {"train": 20_000, "validation": 1_000, "test": 1_000}

_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled"}
    | {"encodings", "pydoc_data"}  # generated tables and generated text
)
_SKIPPED_MODULES = frozenset({"html.entities", "stringprep", "msilib.schema", "msilib.sequence"})

_KEYS = (
    "red blue green pink gold gray north south east west one two three four five six day night "
    "sun moon star rain snow wind fire ice king queen lord boy girl man left right up down"
).split()
_VALUES = (
    "dog cat cow pig fox hen bee ant owl bear fish bird cup pot pan jar box bag bed desk door lamp "
    "book pen ball car bus ship boat tree leaf root seed hat coat shoe ring bell drum horn"
).split()
_RECALL_LINES = (32, 42)  # lines in a document, most of them repeating an earlier pair
_QUERIED_PAIRS = (2, 2, 3, 3, 4, 4, 4, 5, 6)  # drawn evenly
_ECHOED_PAIRS = (3, 10)
_ECHO_SHARE = 0.25
_PARTNER_SHARE = 0.75  # questions for the partner of a value, not for the value
_ARITHMETIC_LINES = (16, 30)
_OPERAND_LIMITS = (100, 20)


def documents(domain: str, split: str) -> list[str]:
    """All documents of one domain and split, in a fixed order.

    Raises ValueError for a domain or split that does not exist.
    """
    return list(_cached_documents(domain, split))


def passages(domain: str, split: str) -> list[str]:
    """The documents of one domain and split, long ones cut at line boundaries.

    A passage has at most about `PASSAGE_CHARACTERS` characters unless one line is longer.
    """
    return list(_cached_passages(domain, split))


def mixture(split: str, num_documents: int, seed: int) -> list[str]:
    """`num_documents` passages drawn domain by domain by `MIXTURE`, shuffled by `seed`.

    No passage repeats while its domain has enough of them. Raises ValueError for an unknown split
    or a negative count.
    """
    if num_documents < 0:
        raise ValueError(f"num_documents must not be negative, got {num_documents}")
    _check(DOMAINS[0], split)
    generator = random.Random(f"mixture/{split}/{seed}")
    drawn: list[str] = []
    for domain, count in _counts(num_documents).items():
        drawn.extend(_draw(_cached_passages(domain, split), count, generator))
    generator.shuffle(drawn)
    return drawn


def split_of(name: str) -> str:
    """The split a document belongs to, by a stable hash of its name: about 90/5/5."""
    fraction = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    if fraction < 0.9:
        return "train"
    return "validation" if fraction < 0.95 else "test"


def recall_pairs(generator: random.Random, num_pairs: int) -> dict[str, str]:
    """`num_pairs` random keys with distinct values, in the order in which they are listed."""
    keys = generator.sample(_KEYS, num_pairs)
    return dict(zip(keys, generator.sample(_VALUES, num_pairs), strict=True))


def partner(value: str) -> str:
    """The value that a recall question with `PARTNER_SIGN` wants for a listed value.

    The pairing is the same everywhere: it has to be known, as the list does not show it. Raises
    ValueError for a word that is no value.
    """
    return _VALUES[_VALUES.index(value) ^ 1]


def problems(split: str) -> list[tuple[int, str, int, int]]:
    """Every arithmetic problem of a split as (left, operator, right, result)."""
    return list(_cached_problems(split))


def questions(domain: str, split: str) -> tuple[tuple[str, str], ...]:
    """Prompts with their answers from the beginnings of a domain's documents.

    arithmetic: the third problem after two solved ones; recall: the first question that asks for a
    partner, after the list. Raises ValueError for another domain, or a split that does not exist.
    """
    if domain not in QUESTION_DOMAINS:
        raise ValueError(f"no questions in {domain!r}; there are {', '.join(QUESTION_DOMAINS)}")
    cut = _cut_at_sum if domain == "arithmetic" else _cut_at_partner
    return tuple(
        question for document in _cached_documents(domain, split) for question in cut(document)
    )


def _cut_at_sum(document: str) -> Iterator[tuple[str, str]]:
    *solved, asked = document.split("\n")[:3]
    problem, result = asked.split("=")
    yield "\n".join([*solved, f"{problem}="]), result


def _cut_at_partner(document: str) -> Iterator[tuple[str, str]]:
    listed, sign, asked = document.partition(f"\n{PARTNER_SIGN}")
    if sign:
        key, wanted = asked.partition("\n")[0].split(" ")
        yield f"{listed}{sign}{key}", f" {wanted}"


def _check(domain: str, split: str) -> None:
    if domain not in DOMAINS:
        raise ValueError(f"unknown domain {domain!r}; there are {', '.join(DOMAINS)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; there are {', '.join(SPLITS)}")


def _source(domain: str, split: str) -> str:
    """12 hexadecimal digits over what texts are made from: the interpreter, this file, modules."""
    _check(domain, split)
    made_by = [sys.version, Path(__file__).read_bytes()]
    return hashlib.sha256(repr((made_by, _module_files(domain))).encode()).hexdigest()[:12]


def _module_files(domain: str) -> list[tuple[str, int, int, int]]:
    """The files that a domain is read from: path, size, and the times of their last changes."""
    if domain not in LIBRARY_DOMAINS:
        return []
    topics = Path(importlib.import_module("pydoc_data.topics").__file__ or "")
    files = [path for _, path in _modules()] + [topics]
    stats = ((str(file), file.stat()) for file in files)
    return [(file, told.st_size, told.st_mtime_ns, told.st_ctime_ns) for file, told in stats]


@kept_by_source("documents", _source)
def _cached_documents(domain: str, split: str) -> tuple[str, ...]:
    return _made_documents(domain, split)


@kept_by_source("passages", _source)
def _cached_passages(domain: str, split: str) -> tuple[str, ...]:
    all_passages: list[str] = []
    for document in _made_documents(domain, split):
        all_passages.extend(_cut(document))
    return tuple(all_passages)


@cache
def _made_documents(domain: str, split: str) -> tuple[str, ...]:
    _check(domain, split)
    if domain == "arithmetic":
        return tuple(_arithmetic(split))
    if domain == "recall":
        return tuple(_recall(split))
    return tuple(_library_documents(split)[domain])


def _cut(document: str) -> Iterator[str]:
    if len(document) <= PASSAGE_CHARACTERS:
        yield document
        return
    passage = ""
    for line in document.splitlines(keepends=True):
        if passage and len(passage) + len(line) > PASSAGE_CHARACTERS:
            yield from _worth_keeping(passage)
            passage = ""
        passage += line
    yield from _worth_keeping(passage)


def _worth_keeping(passage: str) -> Iterator[str]:
    passage = passage.strip("\n")
    if len(passage.strip()) >= MINIMUM_CHARACTERS:
        yield passage


def _counts(total: int) -> dict[str, int]:
    """Samples per domain that add up to `total`, by largest remainder."""
    counts = {domain: int(share * total) for domain, share in MIXTURE.items()}
    remainders = sorted(MIXTURE, key=lambda domain: counts[domain] - MIXTURE[domain] * total)
    for domain in remainders[: total - sum(counts.values())]:
        counts[domain] += 1
    return counts


def _draw(pool: tuple[str, ...], count: int, generator: random.Random) -> list[str]:
    drawn: list[str] = []
    while len(drawn) < count:
        drawn.extend(generator.sample(pool, min(len(pool), count - len(drawn))))
    return drawn


@cache
def _library_documents(split: str) -> dict[str, list[str]]:
    """Prose and code of a split of the standard library by domain, modules in alphabetic order."""
    by_domain: dict[str, list[str]] = {domain: [] for domain in LIBRARY_DOMAINS}
    for name, path in _modules():
        if split_of(name) != split:
            continue
        source = path.read_bytes().decode("ascii", errors="ignore").replace("\r\n", "\n")
        try:
            texts = _separate(source.expandtabs(4))
        except SyntaxError:  # templates and files for other language versions
            continue
        for domain, document in zip(LIBRARY_DOMAINS, texts, strict=True):
            if len(document) >= MINIMUM_CHARACTERS:
                by_domain[domain].append(document)
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        if split_of(f"topic {name}") == split:
            document = topics[name].encode("ascii", errors="ignore").decode()
            by_domain["prose"].append(_without_examples(document))
    return by_domain


def _modules() -> list[tuple[str, Path]]:
    """Dotted names and paths of the standard library's modules, without tests and tables."""
    root = Path(sysconfig.get_path("stdlib"))
    modules = []
    for folder, inner, files in os.walk(root):
        inner[:] = [name for name in inner if name not in _SKIPPED_FOLDERS]
        above = Path(folder).relative_to(root).parts
        for file in files:
            stem, ending = os.path.splitext(file)
            name = ".".join([*above, stem])
            generated = stem.startswith("_sysconfigdata") or (*above, stem)[0].startswith("config-")
            if ending == ".py" and not generated and name not in _SKIPPED_MODULES:
                modules.append((name, Path(folder, file)))
    return sorted(modules)


def _separate(source: str) -> tuple[str, str]:
    """Docstrings of a module, and its source without them."""
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    lines = source.splitlines(keepends=True)
    docstrings = []
    for node in _statements(ast.parse(source)):
        text = ast.get_docstring(node, clean=False) if isinstance(node, holders) else None
        if not isinstance(node, holders) or text is None:
            continue
        first = node.body[0]
        docstrings.append((first.lineno, _without_examples(inspect.cleandoc(text))))
        _blank(lines, first, "pass" if len(node.body) == 1 else "")
    prose = "\n\n".join(docstring for _, docstring in sorted(docstrings) if docstring)
    return prose, "".join(line for line in lines if line).strip("\n")


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """A node and all statements inside it; expressions, which hold no docstrings, are left out."""
    yield node
    for block in ("body", "orelse", "handlers", "finalbody", "cases"):
        inner = getattr(node, block, ())
        for child in inner if isinstance(inner, list) else ():
            yield from _statements(child)


def _blank(lines: list[str], node: ast.stmt, replacement: str) -> None:
    """Put `replacement` where `node` stands in `lines`, dropping lines that become empty."""
    first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
    line = lines[first][: node.col_offset] + replacement + lines[last][node.end_col_offset :]
    for index in range(first, last + 1):
        lines[index] = ""
    lines[first] = line if line.strip() else ""


def _without_examples(text: str) -> str:
    """Text without its interactive examples, which are code and not prose."""
    paragraphs = [paragraph for paragraph in text.split("\n\n") if ">>>" not in paragraph]
    return "\n\n".join(paragraphs).strip()


@cache
def _cached_problems(split: str) -> tuple[tuple[int, str, int, int], ...]:
    _check(DOMAINS[0], split)
    every = []
    for left in range(_OPERAND_LIMITS[0]):
        for right in range(_OPERAND_LIMITS[1]):
            if split_of(f"{left}+{right}") == split:
                every.append((left, "+", right, left + right))
            if right <= left and split_of(f"{left}-{right}") == split:
                every.append((left, "-", right, left - right))
    return tuple(every)


def _arithmetic(split: str) -> Iterator[str]:
    generator = random.Random(f"arithmetic/{split}")
    pool = _cached_problems(split)
    sums = [f"{left}{operator}{right}={result}" for left, operator, right, result in pool]
    for _ in range(GENERATED_DOCUMENTS[split]):
        yield "\n".join(generator.choices(sums, k=generator.randint(*_ARITHMETIC_LINES)))


def _recall(split: str) -> Iterator[str]:
    """Lists of key and value pairs that are asked again and again.

    Some documents repeat a longer list in order: there nearly every token can be copied from the
    previous round, which is what makes copying learnable at all; short lists alone left a model
    guessing among their values. The others ask in random order, mostly for a value's partner,
    since plain copying is attention's work alone and stays when experts are removed.
    """
    generator = random.Random(f"recall/{split}")
    for _ in range(GENERATED_DOCUMENTS[split]):
        total = generator.randint(*_RECALL_LINES)
        if generator.random() < _ECHO_SHARE:
            pairs = recall_pairs(generator, generator.randint(*_ECHOED_PAIRS))
            lines = ([f"{key} {value}" for key, value in pairs.items()] * total)[:total]
        else:
            pairs = recall_pairs(generator, generator.choice(_QUERIED_PAIRS))
            lines = [f"{key} {value}" for key, value in pairs.items()]
            while len(lines) < total:
                key = generator.choice(list(pairs))
                if generator.random() < _PARTNER_SHARE:
                    lines.append(f"{PARTNER_SIGN}{key} {partner(pairs[key])}")
                else:
                    lines.append(f"{key} {pairs[key]}")
        yield "\n".join(lines)
