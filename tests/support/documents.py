"""Small files of documents and questions, and what samples of them say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_lab.data.files import Files
from moe_lab.data.source import Source
from moe_lab.data.tokens import IGNORED, Tokens

ROWS = [f"document {number} " + "x" * number for number in range(12)]


def files(path: Path, **options: Any) -> Files:
    return Files(**({"num_samples": 12, "max_length": 64, "files": (str(path),)} | options))


def decoded(tokens: Tokens, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(list(sample)) for sample in tokens.samples]


class Endless(Source):
    """Documents that all say the same, without end."""

    def documents(self) -> Any:
        while True:
            yield f"sample of length {self.max_length}"


QUESTIONS = [
    {"question": f"{number}+{number}=", "reply": f"{2 * number}", "label": number % 2, "none": None}
    for number in range(6)
]
TEMPLATES = dict(num_samples=6, prompt="{question}", answer="{reply}")


def answers(tokens: Tokens, tokenizer: Any) -> list[str]:
    """What a model learns of each sample: the text of its labels."""
    found = []
    for row in range(len(tokens.samples)):
        labels = tokens.take([row]).labelled()["labels"][0]
        found.append(tokenizer.decode(labels[labels != IGNORED].tolist()))
    return found
