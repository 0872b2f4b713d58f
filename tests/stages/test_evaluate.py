"""Evaluation: on mirrored tasks, and each group's tasks with its experts alone."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mirrors import (
    best,
    num_questions,
    questions,
    reviews,
    sst5_accuracy,
    subjects,
    write_mmlu,
    write_sst5,
)
from running import SENTENCES, Job, Outcome
from small_suites import GROUPS, SUITE
from transformers import AutoModelForCausalLM, LlamaConfig

from moe_lab.compute import Compute
from moe_lab.data.files import Files
from moe_lab.data.tokens import Tokens
from moe_lab.evaluate.decoding.scmoe import SCMoE
from moe_lab.evaluate.suite import Suite
from moe_lab.methods.metrics import frequency
from moe_lab.methods.prune import Prune
from moe_lab.methods.ratios.uniform import Uniform
from moe_lab.models.checkpoint import Checkpoint, resolve
from moe_lab.models.edits.plan import Plan
from moe_lab.models.layers import moe_layers
from moe_lab.stages.compress import Compression, compress
from moe_lab.stages.context import Context
from moe_lab.stages.evaluate import (
    Evaluation,
    _check_left,
    asked_of,
    evaluate,
    results_of,
    tell_scores,
)
from moe_lab.stages.evaluate_groups import GroupEvaluation, evaluate_groups
from moe_lab.stages.plan import Planning, plan
from moe_lab.stages.profile import Profiling, profile
from moe_lab.store import Artifact, Store


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
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    return Context(Store(tmp_path_factory.mktemp("store")), Compute("cpu", batch_size=8))


@pytest.fixture(scope="module")
def dense(checkpoint: Path) -> Checkpoint:
    return resolve(str(checkpoint), None, "float32")


def planned(context: Context, dense: Checkpoint, tokens: Tokens, ratio: float = 0.5) -> Artifact:
    method = Prune(frequency.frequency, Uniform(ratio))
    profiled = profile(context, Profiling(dense, tokens))
    options = {"metric": {}, "ratio": {"ratio": ratio}}
    return plan(context, Planning(dense, profiled, tokens, method, options))


def source(rows: Path, **options: Any) -> Files:
    return Files(**{"num_samples": 8, "max_length": 32, "files": (str(rows),), **options})


def test_masked_equals_pruned(
    context: Context, dense: Checkpoint, rows: Path, tokenizer: Any
) -> None:
    """A group's figures are those of the checkpoint that its documents alone compress to."""
    grouped = planned(context, dense, source(rows, group_by="domain").tokens(tokenizer))
    found = results_of(evaluate_groups(context, GroupEvaluation(dense, grouped, SUITE, {})))
    expected: dict[str, float] = {}
    averages = []
    for group in GROUPS:
        only = source(rows, group_by="domain", group=group, num_samples=4).tokens(tokenizer)
        one = planned(context, dense, only)
        folder = compress(context, Compression(dense, one))
        checkpoint = Checkpoint(folder.folder / "checkpoint", dense.dtype, folder.key)
        suite = Suite(tasks=SUITE.tasks_of(group), num_items=2, num_fewshot=0)
        results = results_of(evaluate(context, Evaluation(checkpoint, dense, suite, {})))
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
    context: Context, dense: Checkpoint, rows: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is loaded once for all groups, and a forward after them gives the same logits."""
    loaded: list[Any] = []
    load = Checkpoint.load

    def kept_load(self: Checkpoint, *args: Any) -> Any:
        loaded.append(load(self, *args))
        return loaded[-1]

    monkeypatch.setattr(Checkpoint, "load", kept_load)
    tokens = source(rows, group_by="domain").tokens(tokenizer)
    grouped = planned(context, dense, tokens, ratio=0.25)
    loaded.clear()
    evaluate_groups(context, GroupEvaluation(dense, grouped, SUITE, {}))
    assert len(loaded) == 1
    batch = tokens.batches(4)[0]
    with torch.inference_mode():
        assert torch.equal(loaded[0](**batch).logits, load(dense)(**batch).logits)
    assert all(layer.info.num_experts == 8 for layer in moe_layers(loaded[0]))


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


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Whatever tries to connect is noted and refused, though nothing is set to be offline."""
    import datasets
    import huggingface_hub

    tried: list[Any] = []

    def connect(self: socket.socket, address: Any) -> None:
        tried.append(address)
        raise ConnectionRefusedError(address)

    monkeypatch.setattr(socket.socket, "connect", connect)
    for place in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(place, "HF_HUB_OFFLINE", False)
    yield tried


@pytest.mark.slow
@pytest.mark.usefixtures("own_cache")
def test_seer_on_a_mirror(
    job: Job, tmp_path: Path, checkpoint: Path, tokenizer: Any, no_network: list[Any]
) -> None:
    mirror, rows = tmp_path / "mirror", reviews("test", 9)
    write_mmlu(mirror)
    write_sst5(mirror, rows)
    options = ["method=none", "eval=seer", f"eval.mirror={mirror}", "eval.held_out.num_samples=2"]
    outcome = job(*options)
    assert outcome.code == 0, outcome.text
    assert not no_network
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    found = {
        key.removeprefix("dense/eval/"): value
        for key, value in outcome.report.items()
        if key.startswith("dense/eval/")
    }
    assert found["sst5/acc"] == sst5_accuracy(model, tokenizer, rows)
    assert 0 <= found["sst5_generate/exact_match"] <= 1
    scores = {name: found[f"mmlu_{name}/acc"] for name in subjects()}
    sizes = {name: num_questions(name) for name in subjects()}
    assert len(scores) == 57 and len(set(scores.values())) > 1
    mean = sum(scores[name] * sizes[name] for name in scores) / sum(sizes.values())
    assert found["mmlu/acc"] == pytest.approx(mean)
    assert found["average"] == pytest.approx((mean + found["sst5/acc"]) / 2)
    for subject in ("anatomy", "virology", "marketing"):
        right = []
        for row in questions(subject, "test", num_questions(subject)):
            lines = [f"{a}. {b}" for a, b in zip("ABCD", row["choices"], strict=True)]
            prompt = "\n".join([row["question"], *lines, "Answer:"])
            topic = f"The following are multiple choice questions (with answers) about {subject}."
            answers = [f" {letter}" for letter in "ABCD"]
            choice = best(model, tokenizer, f"{topic}\n\n{prompt}", answers)
            right.append(choice == row["answer"])
        assert scores[subject] == sum(right) / len(right)
    identity = json.loads(next(outcome.store.glob("evaluate/*/artifact.json")).read_text())
    assert str(mirror) not in json.dumps(identity)


def test_the_entropy_of_repeated_experts_is_not_told() -> None:
    report: dict[str, Any] = {"compressed/repeated_parameters": 5}
    for name in ("dense", "compressed", "compressed_top_1"):
        tell_scores(report, name, {"routing/entropy": 1.0, "kl": 0.5, "average": 0.7})
    assert {key for key in report if "entropy" in key} == {"dense/eval/routing/entropy"}
    assert report["compressed_top_1/kl"] == 0.5
    assert report["compressed/eval/average"] == 0.7


def test_what_decodes_enters_the_key_by_what_it_decides() -> None:
    """By name or by its node; what it does not use, and held-out text alone, change nothing."""

    def asked(given: Any, tasks: tuple[str, ...] = ("sst5",)) -> Any:
        return asked_of(tasks, None, {"num_items": 2, "decoding": given})

    node = {"_target_": "moe_lab.evaluate.decoding.scmoe.SCMoE"}
    assert asked("scmoe") == asked(node) == asked(node | {"seed": 3})
    assert asked("greedy") == asked_of(["sst5"], None, {"num_items": 2})
    every = [asked(one) for one in ("greedy", "scmoe", node | {"beta": 0.3}, "dynamic")]
    assert all(one not in every[:number] for number, one in enumerate(every))
    assert asked("scmoe", ()) == asked("greedy", ())


def test_a_model_without_moe_layers_is_said_to_have_nothing_to_contrast(
    caplog: pytest.LogCaptureFixture,
) -> None:
    small = dict(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    variant: Any = SimpleNamespace(config=LlamaConfig(intermediate_size=8, **small))
    _check_left(SCMoE(rank=7), variant)
    assert "decoding=scmoe: the model has no MoE layer any more" in caplog.text


def test_a_job_that_is_decoded_by_self_contrast(job: Job) -> None:
    """Every variant; the report says how."""
    few = ["eval=tiny_generate", "eval.num_items=3"]
    done = job(*few, "decoding=scmoe", "decoding.beta=0.3", "finetune=none")
    assert done.code == 0, done.text
    told = {name: done.report[f"eval/{name}"] for name in ("decoding", "beta", "alpha", "rank")}
    assert told == {"decoding": "scmoe", "beta": 0.3, "alpha": 0.1, "rank": 2}
    for variant in ("dense", "compressed"):
        assert f"{variant}/eval/tiny_recall_generate/exact_match" in done.report
