"""Datasets in the hub's layout, local or mirrored, as calibration text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from documents import ROWS, decoded
from hydra.utils import instantiate
from mirrors import LABELS, questions, reviews, subjects, write_mmlu

from moe_lab.data.hub import HubDataset
from moe_lab.evaluate.tasks import harness
from moe_lab.types import UserError


def source(composed: Callable[..., Any], *options: str) -> Any:
    return instantiate(composed(*options).calibration, _convert_="object")


@pytest.mark.parametrize(("option", "rows"), [("sst5", "train"), ("sst5_validation", "dev")])
def test_calibration_on_sst5_has_the_tasks_words(
    sst5: Path, composed: Callable[..., Any], option: str, rows: str
) -> None:
    place = f"calibration.path={sst5 / 'SetFit' / 'sst5'}"
    found = list(source(composed, f"calibration={option}", place).documents())
    assert len(found) == len(reviews(rows, {"train": 6, "dev": 4}[rows]))
    assert all(f"Review: {rows} " in pair.prompt for pair in found)
    asked = source(composed, f"calibration={option}", place, "calibration.split=test").documents()
    with harness.data_from(["sst5"], str(sst5)):
        [task] = harness.load_tasks(["sst5"])
    for pair, row in zip(asked, task.test_docs(), strict=True):
        assert pair.prompt == task.fewshot_context(row, num_fewshot=0)
        assert pair.answer == f" {task.doc_to_choice(row)[task.doc_to_target(row)]}"
        assert pair.answer == f" {row['label_text']}"


@pytest.mark.usefixtures("own_cache")
def test_calibration_on_mmlu_by_subject(
    tmp_path: Path, composed: Callable[..., Any], tokenizer: Any
) -> None:
    place = f"calibration.path={write_mmlu(tmp_path)}"
    options = ["calibration=mmlu_subjects", place]
    grouped = "calibration.group_by=subject"
    tokens = source(composed, *options, grouped, "calibration.num_samples=57").tokens(tokenizer)
    assert list(tokens.by_group()) == subjects()
    one = [grouped, "calibration.group=virology", "calibration.num_samples=1"]
    alone = source(composed, *options, *one).tokens(tokenizer)
    assert alone.samples == tokens.by_group()["virology"].samples
    [row] = questions("virology", "validation", 1)
    lines = [f"{a}. {b}" for a, b in zip("ABCD", row["choices"], strict=True)]
    text = "\n".join([row["question"], *lines, f"Answer: {'ABCD'[row['answer']]}"])
    assert tokenizer.decode(alone.samples[0]) == text
    dev = source(
        composed, *options, grouped, "calibration.split=dev", "calibration.num_samples=114"
    )
    assert {len(part.samples) for part in dev.tokens(tokenizer).by_group().values()} == {2}


def test_calibration_reads_what_a_folder_holds_now(
    sst5: Path, composed: Callable[..., Any], tokenizer: Any
) -> None:
    folder = sst5 / "SetFit" / "sst5"
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n"
        "    path: train.jsonl\n---\n"
    )
    for text in ("old", "new"):
        row = {"text": text, "label": 0, "label_text": LABELS[0]}
        (folder / "train.jsonl").write_text(json.dumps(row) + "\n")
        [pair] = source(composed, "calibration=sst5", f"calibration.path={folder}").documents()
        assert f"Review: {text}\n" in pair.prompt


def test_a_local_folder_of_the_hubs_layout(tokenizer: Any, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "mine"
    (folder / "data").mkdir(parents=True)
    for split, rows in {"train": ROWS, "test": ROWS[:2]}.items():
        table = pyarrow.table({"text": rows, "answer": [row[0] for row in rows]})
        pyarrow.parquet.write_table(table, folder / "data" / f"{split}-00000-of-00001.parquet")
    source = HubDataset(12, 64, path=str(folder))
    assert decoded(source.tokens(tokenizer), tokenizer) == ROWS
    test = HubDataset(2, 64, path=str(folder), split="test", template="{text}: {answer}")
    assert decoded(test.tokens(tokenizer), tokenizer) == [f"{row}: d" for row in ROWS[:2]]
    for wrong in (dict(field="texts"), dict(template="{question}")):
        with pytest.raises(UserError, match=r"\['answer', 'text'\]"):
            HubDataset(1, 64, path=str(folder), **wrong).tokens(tokenizer)
    with pytest.raises(UserError, match="could not be loaded"):
        HubDataset(1, 64, path=str(tmp_path / "nothing")).tokens(tokenizer)


def test_a_hub_dataset_of_pairs_in_parts(tokenizer: Any, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "piqa"
    folder.mkdir()
    rows = [{"goal": f"g{number}", "label": number % 2} for number in range(10)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train.parquet")
    options = dict(path=str(folder), prompt="{goal}", answer="{label}")
    source = HubDataset(7, 64, split="train[:-3]", **options)
    assert decoded(source.tokens(tokenizer), tokenizer) == [f"g{n}{n % 2}" for n in range(7)]
    assert source.sources() == (f"{folder} (train[:-3])",)
    rest = HubDataset(3, 64, split="train[-3:]", **options)
    assert decoded(rest.tokens(tokenizer), tokenizer) == ["g71", "g80", "g91"]
