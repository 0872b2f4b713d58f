"""lm-eval's figures against the model's own likelihoods and its own words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from mirrors import HEAD, reviews, sst5_accuracy, suite, write_sst5
from transformers import AutoModelForCausalLM

from moe_lab.evaluate.run_tasks import run_tasks
from moe_lab.evaluate.suite import Suite


def test_examples_come_from_the_training_split(
    sst5: Path, checkpoint: Path, tokenizer: Any, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    one = reviews("train", 1)
    for path in sst5.glob("SetFit/sst5/train.jsonl"):
        path.write_text(json.dumps(one[0]) + "\n")
    found = run_tasks(model, tokenizer, suite(sst5, num_fewshot=1), tmp_path, batch_size=4)
    example = f"Review: {one[0]['text']}\nSentiment: {one[0]['label_text']}\n\n"
    assert found["sst5/acc"] == sst5_accuracy(model, tokenizer, reviews("test", 9), example)


def test_generation_is_greedy(sst5: Path, checkpoint: Path, tokenizer: Any, tmp_path: Path) -> None:
    """A review whose label is what the model goes on with counts, and no other."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    rows = []
    for row in reviews("test", 4):
        ids = tokenizer(f"{HEAD}\n\nReview: {row['text']}\nSentiment:")["input_ids"]
        start = len(ids)
        for _ in range(16):
            with torch.inference_mode():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        said = tokenizer.decode(ids[start:], skip_special_tokens=True).split("\n")[0]
        rows.append(row | {"label_text": said if len(rows) % 2 else "nothing of the kind"})
    write_sst5(sst5, rows)
    wanted = suite(sst5, tasks=["sst5_generate"], metrics={"sst5_generate": "exact_match"})
    found = run_tasks(model, tokenizer, wanted, tmp_path, batch_size=4)
    assert found == {"sst5_generate/exact_match": 0.5, "average": 0.5}


def test_the_average_is_of_the_tasks_accuracies(
    checkpoint: Path, tokenizer: Any, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    names = ["tiny_prose", "tiny_arithmetic", "tiny_recall", "tiny_perplexity_prose"]
    wanted = Suite(tasks=names, num_items=5, num_fewshot=0)
    found = run_tasks(model, tokenizer, wanted, tmp_path, batch_size=4)
    scores = [found[f"{name}/acc"] for name in names[:3]]
    assert found["average"] == sum(scores) / 3 and sum(scores) > 0
