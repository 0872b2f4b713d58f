"""Small offline evaluation tasks, made at run time from the embedded text's test split.

Four four-way multiple-choice tasks and four perplexity tasks, one per text domain, and two whose
answers are generated, as configurations for the Language Model Evaluation Harness. Nothing is
downloaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moe_lab.data.standard_library import DOMAINS, QUESTION_DOMAINS

MULTIPLE_CHOICE = tuple(f"tiny_{domain}" for domain in DOMAINS)
PERPLEXITY_TASKS = tuple(f"tiny_perplexity_{domain}" for domain in DOMAINS)
GENERATIVE_TASKS = tuple(f"tiny_{domain}_generate" for domain in QUESTION_DOMAINS)
TINY_NAMES = MULTIPLE_CHOICE + PERPLEXITY_TASKS + GENERATIVE_TASKS
# A perplexity sample scores a whole passage, so fewer are needed than multiple-choice items.
ITEMS_PER_PERPLEXITY_SAMPLE = 5


def write_items(folder: Path, num_items: int = 200, seed: int = 0) -> dict[str, Path]:
    """Write `<task>.jsonl` for every task into `folder` and return the paths by task.

    `num_items` is the number of items of each task with one answer; a perplexity task has a fifth
    as many passages. A task that generates has the items of the multiple-choice task of its domain.
    The same arguments always give the same files. Raises ValueError for fewer than one item.
    """
    from moe_lab.evaluate.tasks.tiny import items

    if num_items < 1:
        raise ValueError(f"num_items must be at least 1, got {num_items}")
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for domain, choice, perplexity in zip(DOMAINS, MULTIPLE_CHOICE, PERPLEXITY_TASKS, strict=True):
        num_passages = max(1, num_items // ITEMS_PER_PERPLEXITY_SAMPLE)
        paths[choice] = _write(folder, choice, items.multiple_choice(domain, num_items, seed))
        paths[perplexity] = _write(
            folder, perplexity, items.perplexity_passages(domain, num_passages, seed)
        )
    for domain, task in zip(QUESTION_DOMAINS, GENERATIVE_TASKS, strict=True):
        paths[task] = _write(folder, task, items.generative(domain, num_items, seed))
    return paths


def configs(folder: Path) -> list[dict[str, Any]]:
    """Task configurations, in the order of `NAMES`, that read the files in `folder`."""
    return [_config(name, folder) for name in TINY_NAMES]


def _write(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _config(name: str, folder: Path) -> dict[str, Any]:
    import yaml

    config = yaml.safe_load((Path(__file__).parent / f"{name}.yaml").read_text())
    files = {config["test_split"]: str(folder / f"{name}.jsonl")}
    return {**config, "dataset_path": "json", "dataset_kwargs": {"data_files": files}}
