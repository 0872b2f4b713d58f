"""Plans of groups: each group's tasks on the dense model, with the group's experts alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SENTENCES, Outcome

from moe_lab.compute import Compute
from moe_lab.data.files import Files
from moe_lab.data.tokens import Tokens
from moe_lab.evaluate.suite import Suite
from moe_lab.methods.metrics import frequency
from moe_lab.methods.prune import Prune
from moe_lab.methods.ratios.uniform import Uniform
from moe_lab.models.checkpoint import Checkpoint, resolve
from moe_lab.models.layers import moe_layers
from moe_lab.stages.compress import compress
from moe_lab.stages.evaluate import evaluate, evaluate_groups, results_of
from moe_lab.stages.plan import plan
from moe_lab.stages.profile import profile
from moe_lab.store import Artifact, Store
from moe_lab.types import Plan, UserError

COMPUTE = Compute("cpu", batch_size=8)
SUITE = Suite(num_items=2, num_fewshot=0, group_task=["tiny_{group}", "tiny_perplexity_{group}"])
GROUPS = ("arithmetic", "prose")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of two groups in turn; those of one begin with a sum."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    sums = {"arithmetic": "1+1=2\n" * 4, "prose": ""}
    texts = [(group, sums[group] + text) for text in SENTENCES for group in GROUPS]
    file.write_text(
        "".join(json.dumps({"domain": group, "text": text}) + "\n" for group, text in texts)
    )
    return file


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def dense(checkpoint: Path) -> Checkpoint:
    return resolve(str(checkpoint), None, "float32")


def planned(store: Store, dense: Checkpoint, tokens: Tokens, ratio: float = 0.5) -> Artifact:
    method = Prune(frequency.frequency, Uniform(ratio))
    profiled = profile(store, dense, tokens, COMPUTE)
    return plan(store, dense, profiled, tokens, method, {"ratio": {"ratio": ratio}}, COMPUTE)


def source(rows: Path, **options: Any) -> Files:
    return Files(**{"num_samples": 8, "max_length": 32, "files": (str(rows),), **options})


def test_masked_equals_pruned(store: Store, dense: Checkpoint, rows: Path, tokenizer: Any) -> None:
    """A group's figures are those of the checkpoint that its documents alone compress to."""
    grouped = planned(store, dense, source(rows, group_by="domain").tokens(tokenizer))
    found = results_of(evaluate_groups(store, dense, grouped, SUITE, {}, COMPUTE))
    expected: dict[str, float] = {}
    averages = []
    for group in GROUPS:
        only = source(rows, group_by="domain", group=group, num_samples=4).tokens(tokenizer)
        one = planned(store, dense, only)
        folder = compress(store, dense, one, COMPUTE)
        checkpoint = Checkpoint(folder.folder / "checkpoint", dense.dtype, folder.key)
        suite = Suite(tasks=SUITE.tasks_of(group), num_items=2, num_fewshot=0)
        results = results_of(evaluate(store, checkpoint, dense, suite, {}, None, COMPUTE))
        averages.append(results.pop("average"))
        expected |= results
    assert found.pop("groups") == 2
    assert found.pop("average") == pytest.approx(sum(averages) / 2)
    assert found == pytest.approx(expected, rel=1e-5)
    kept = [
        [edit.kept for edit in Plan.load(grouped.folder / "plans" / f"{number}.json").edits]
        for number in range(2)
    ]
    assert kept[0] != kept[1], "the groups must differ for this to say anything"


def test_the_dense_model_is_left_as_it_was(
    store: Store, dense: Checkpoint, rows: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is loaded once for all groups, and a forward after them gives the same logits."""
    loaded: list[Any] = []
    load = Checkpoint.load

    def kept_load(self: Checkpoint, *args: Any) -> Any:
        loaded.append(load(self, *args))
        return loaded[-1]

    monkeypatch.setattr(Checkpoint, "load", kept_load)
    tokens = source(rows, group_by="domain").tokens(tokenizer)
    grouped = planned(store, dense, tokens, ratio=0.25)
    loaded.clear()
    evaluate_groups(store, dense, grouped, SUITE, {}, COMPUTE)
    assert len(loaded) == 1
    batch = tokens.batches(4)[0]
    with torch.inference_mode():
        assert torch.equal(loaded[0](**batch).logits, load(dense)(**batch).logits)
    assert all(layer.info.num_experts == 8 for layer in moe_layers(loaded[0]))


def test_what_is_refused() -> None:
    SUITE.check_groups(GROUPS)
    Suite(group_task="tiny_{group}").check_groups(["code"])
    with pytest.raises(UserError, match=r'eval.group_task="mmlu_\{group\}"'):
        Suite().check_groups(GROUPS)
    with pytest.raises(UserError, match="one task for all groups"):
        Suite(group_task="tiny_prose").check_groups(GROUPS)


@pytest.mark.slow  # reads the names of all of lm-eval's tasks
def test_groups_without_tasks_are_refused() -> None:
    with pytest.raises(UserError, match=r"\['tiny_poems', 'tiny_perplexity_poems'\].*tiny_prose"):
        SUITE.check_groups(["prose", "poems"])


def test_a_job_with_groups(job: Callable[..., Outcome], rows: Path) -> None:
    options = [f"calibration.files=[{rows}]", "calibration.group_by=domain"]
    none = job(*options, "eval=perplexity", "eval.held_out.num_samples=2")
    assert none.code == 2 and "eval.group_task=" in none.text and not none.stages()
    tasks = ["eval.tasks=[tiny_prose,tiny_arithmetic]", 'eval.group_task="tiny_{group}"']
    few = ["eval.num_items=4", "eval.held_out.num_samples=2", "ratio.ratio=0.5"]
    outcome = job(*options, "metric=soft_count", "eval=tiny", *tasks, *few)
    assert outcome.code == 0, outcome.text
    report = outcome.report
    scores = [report[f"compressed/eval/tiny_{group}/acc"] for group in GROUPS]
    assert report["compressed/eval/average"] == pytest.approx(sum(scores) / 2)
    assert report["compressed/eval/groups"] == 2
    assert report["dense/eval/routing/top_k"] == 3
