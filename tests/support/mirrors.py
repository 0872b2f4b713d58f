"""Mirrors of SST-5 and MMLU in the hub's layout, and accuracies by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from moe_lab.evaluate.suite import Suite

LABELS = ("very negative", "negative", "neutral", "positive", "very positive")
HEAD = "The sentiment of a review is very negative, negative, neutral, positive or very positive."
Row = dict[str, Any]


def reviews(split: str, count: int) -> list[Row]:
    return [
        {"text": f"{split} {number}: a film", "label": label, "label_text": LABELS[label]}
        for number in range(count)
        for label in [(3 * number + 1) % len(LABELS)]
    ]


def write_sst5(mirror: Path, test: list[Row]) -> Path:
    """SetFit/sst5 as the hub has it: one file a split, dev.jsonl being the validation split."""
    folder = mirror / "SetFit" / "sst5"
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in {
        "train": reviews("train", 6),
        "dev": reviews("dev", 4),
        "test": test,
    }.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "README.md").write_text("# SST-5\n")
    return folder


def subjects() -> list[str]:
    import lm_eval

    tasks = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default"
    return sorted(path.stem.removeprefix("mmlu_") for path in tasks.glob("mmlu_*.yaml"))


def questions(subject: str, split: str, count: int) -> list[Row]:
    return [
        {
            "question": f"{split} {number} of {subject}?",
            "subject": subject,
            "choices": [f"{number}{letter}" for letter in "wxyz"],
            "answer": (len(subject) + number) % 4,
        }
        for number in range(count)
    ]


def num_questions(subject: str) -> int:
    return 3 if subject in ("anatomy", "virology") else 1


def write_mmlu(mirror: Path) -> Path:
    """cais/mmlu as the hub has it: a folder a subject, and `all` of them together."""
    import pyarrow
    import pyarrow.parquet

    folder = mirror / "cais" / "mmlu"
    configs: dict[str, dict[str, list[Row]]] = {}
    for subject in subjects():
        counts = {"test": num_questions(subject), "validation": 1, "dev": 2}
        configs[subject] = {
            split: questions(subject, split, count) for split, count in counts.items()
        }
    configs["all"] = {
        split: [row for subject in subjects() for row in configs[subject][split]]
        for split in ("test", "validation", "dev")
    }
    card = ["---", "configs:"]
    for name, splits in configs.items():
        (folder / name).mkdir(parents=True)
        card += [f"- config_name: {name}", "  data_files:"]
        for split, rows in splits.items():
            table = pyarrow.Table.from_pylist(rows)
            pyarrow.parquet.write_table(table, folder / name / f"{split}-00000-of-00001.parquet")
            card += [f"  - split: {split}", f"    path: {name}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*card, "---", "# MMLU", ""]))
    return folder


def log_likelihood(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    ids, start = tokenizer(prompt + answer)["input_ids"], len(tokenizer(prompt)["input_ids"])
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
    return sum(float(logits[i - 1, ids[i]]) for i in range(start, len(ids)))


def best(model: Any, tokenizer: Any, prompt: str, answers: list[str]) -> int:
    scores = [log_likelihood(model, tokenizer, prompt, answer) for answer in answers]
    return scores.index(max(scores))


def sst5_accuracy(model: Any, tokenizer: Any, rows: list[Row], examples: str = "") -> float:
    right = 0
    for row in rows:
        prompt = f"{HEAD}\n\n{examples}Review: {row['text']}\nSentiment:"
        right += best(model, tokenizer, prompt, [f" {label}" for label in LABELS]) == row["label"]
    return right / len(rows)


def suite(mirror: Path, **values: Any) -> Suite:
    return Suite(**{"tasks": ["sst5"], "num_fewshot": 0, "mirror": str(mirror), **values})
