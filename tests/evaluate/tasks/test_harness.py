"""Tasks on datasets of the hub, read from mirrors in the hub's layout."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from mirrors import HEAD, LABELS, best, reviews, suite
from transformers import AutoModelForCausalLM

from moe_lab.evaluate.run_tasks import run_tasks
from moe_lab.evaluate.tasks import harness
from moe_lab.types import UserError


def test_new_files_give_new_results(sst5: Path, checkpoint: Path, tokenizer: Any) -> None:
    """Also where names, sizes and times of the files stay as they were."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    file = sst5 / "SetFit" / "sst5" / "test.jsonl"
    prompt = f"{HEAD}\n\nReview: test 0: a film\nSentiment:"
    choice = best(model, tokenizer, prompt, [f" {label}" for label in LABELS])
    times, row, keys = file.stat(), reviews("test", 1)[0], set()
    for label, expected in ((choice, 1.0), ((choice + 1) % 5, 0.0)):
        file.write_text(json.dumps(row | {"label": label, "label_text": "same"}) + "\n")
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        found = run_tasks(model, tokenizer, suite(sst5), sst5, batch_size=4)
        assert found["sst5/acc"] == expected
        keys.add(harness.fingerprint(["sst5"], str(sst5)))
    assert len(keys) == 2


def test_the_same_content_elsewhere_is_the_same(sst5: Path, tmp_path: Path) -> None:
    before = harness.fingerprint(["sst5"], str(sst5))
    sst5.rename(tmp_path / "moved")
    (tmp_path / "moved" / "other" / "dataset").mkdir(parents=True)
    (tmp_path / "moved" / "other" / "dataset" / "rows.jsonl").write_text("{}\n")
    assert harness.fingerprint(["sst5"], str(tmp_path / "moved")) == before


@pytest.mark.parametrize("said", ["{}", " {} ", "\t{}.", " {}!", "{}\nReview: more"])
def test_what_counts_as_the_label(sst5: Path, said: str) -> None:
    """The generated line is compared without case, punctuation and the space around it."""
    with harness.data_from(["sst5_generate"], str(sst5)):
        [task] = harness.load_tasks(["sst5_generate"])
    assert task.config.generation_kwargs["until"] == ["\n"]
    row = task.test_docs()[0]
    for case in (str.lower, str.title):
        line = said.format(case(row["label_text"])).split("\n")[0]  # as lm-eval cuts at `until`
        assert task.process_results(row, [line]) == {"exact_match": 1.0}
    wrong = "very positive" if row["label_text"] != "very positive" else "neutral"
    for line in (wrong, f"not {row['label_text']}", "", row["label_text"].replace("e", "a")):
        assert task.process_results(row, [line]) == {"exact_match": 0.0}


def test_a_broken_file_is_refused(sst5: Path) -> None:
    (sst5 / "SetFit" / "sst5" / "test.jsonl").write_text("no JSON\n")
    with harness.data_from(["sst5"], str(sst5)), pytest.raises(UserError, match="of the task sst5"):
        harness.load_tasks(["sst5"])
