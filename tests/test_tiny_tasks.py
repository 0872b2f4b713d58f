"""The tiny tasks: their files, items and configurations."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from moe_lab.data import standard_library
from moe_lab.evaluate.tasks.tiny import items, tasks

NUM_ITEMS = 32


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tasks.write_items(tmp_path_factory.mktemp("items"), NUM_ITEMS, seed=0)


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_task_has_a_file_and_a_configuration(written: dict[str, Path]) -> None:
    assert tuple(written) and set(written) == set(tasks.TINY_NAMES)
    folder = written["tiny_prose"].parent
    for name, config in zip(tasks.TINY_NAMES, tasks.configs(folder), strict=True):
        assert config["task"] == name
        assert config["dataset_path"] == "json"
        assert config["dataset_kwargs"]["data_files"]["test"] == str(written[name])


def test_files_depend_on_the_seed_alone(written: dict[str, Path], tmp_path: Path) -> None:
    again = tasks.write_items(tmp_path / "again", NUM_ITEMS, seed=0)
    other = tasks.write_items(tmp_path / "other", NUM_ITEMS, seed=1)
    for name in tasks.TINY_NAMES:
        assert again[name].read_bytes() == written[name].read_bytes()
        assert other[name].read_bytes() != written[name].read_bytes()


@pytest.mark.parametrize("name", tasks.MULTIPLE_CHOICE)
def test_choices_are_distinct_equally_long_and_balanced(
    name: str, written: dict[str, Path]
) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(items.TOKENIZER))
    rows = _read(written[name])
    assert len(rows) == NUM_ITEMS
    positions = Counter(row["answer"] for row in rows)
    assert set(positions) == set(range(4))
    assert max(positions.values()) - min(positions.values()) <= 1
    for row in rows:
        assert len(set(row["choices"])) == items.NUM_CHOICES
        context = tokenizer.encode(row["context"]).ids
        assert len(context) <= 64
        lengths = set()
        for choice in row["choices"]:
            whole = tokenizer.encode(row["context"] + choice).ids
            assert whole[: len(context)] == context
            lengths.add(len(whole) - len(context))
        assert len(lengths) == 1


@pytest.mark.parametrize("domain", ["prose", "code"])
def test_choices_come_from_one_held_out_document(domain: str, written: dict[str, Path]) -> None:
    documents = standard_library.documents(domain, "test")
    for row in _read(written[f"tiny_{domain}"]):
        right = row["context"] + row["choices"][row["answer"]]
        homes = [document for document in documents if right in document]
        assert any(all(choice in home for choice in row["choices"]) for home in homes)


def test_arithmetic_answers_are_right_and_unseen(written: dict[str, Path]) -> None:
    train = {
        line for d in standard_library.documents("arithmetic", "train") for line in d.splitlines()
    }
    for row in _read(written["tiny_arithmetic"]):
        problem = row["context"].splitlines()[-1].removesuffix("=")
        answer = row["choices"][row["answer"]]
        assert eval(problem) == int(answer)
        assert f"{problem}={answer}" not in train


def test_recall_answers_follow_from_the_list(written: dict[str, Path]) -> None:
    for row in _read(written["tiny_recall"]):
        *lines, question = row["context"].splitlines()
        pairs = dict(line.split(" ") for line in lines)
        value = pairs[question.removeprefix(standard_library.PARTNER_SIGN)]
        assert row["choices"][row["answer"]].strip() == standard_library.partner(value)


def test_impossible_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        tasks.write_items(tmp_path, 0)
    with pytest.raises(ValueError, match="unknown domain 'poetry'"):
        items.multiple_choice("poetry", 1, 0)


def test_importing_is_cheap() -> None:
    ours = "moe_lab.data.standard_library, moe_lab.evaluate.tasks.tiny.tasks"
    code = f"import sys, {ours}; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
