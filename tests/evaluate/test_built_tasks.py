"""Requests are built once, and answered anew by each model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model

from moe_lab.evaluate import built_tasks
from moe_lab.evaluate.run_tasks import run_tasks
from moe_lab.evaluate.suite import Suite
from moe_lab.models.checkpoint import Model

SUITE = Suite(tasks=["tiny_recall", "tiny_perplexity_recall"], num_items=6, num_fewshot=0)


@pytest.fixture
def models(tokenizer: Any) -> list[Model]:
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 512}
    return [tiny_model("mixtral", seed, **sizes) for seed in (0, 1)]


def test_a_second_model_gets_what_it_would_get_alone(
    models: list[Model], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scores(model: Model) -> dict[str, float]:
        return run_tasks(model, tokenizer, SUITE, tmp_path, batch_size=4)

    alone = []
    for model in models:
        monkeypatch.setattr(built_tasks, "_kept", {})
        alone.append(scores(model))
    written = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.jsonl")}
    assert [scores(model) for model in reversed(models)] == alone[::-1] and alone[0] != alone[1]
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.jsonl")} == written


def test_other_numbers_of_items_are_other_tasks(tmp_path: Path) -> None:
    one = built_tasks.built_tasks(SUITE, tmp_path)
    assert built_tasks.built_tasks(SUITE, tmp_path / "never made") is one
    more = Suite(tasks=list(SUITE.tasks), num_items=7, num_fewshot=0)
    assert built_tasks.built_tasks(more, tmp_path) is not one
    assert torch.is_grad_enabled() and len(one.embedded["tasks"]) == 2 and not one.others


def test_few_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(built_tasks, "_kept", {})
    monkeypatch.setattr(built_tasks, "SUITES_KEPT", 1)
    first = built_tasks.built_tasks(SUITE, tmp_path)
    built_tasks.built_tasks(Suite(tasks=["tiny_recall"], num_items=2), tmp_path)
    assert len(built_tasks._kept) == 1 and built_tasks.built_tasks(SUITE, tmp_path) is not first
