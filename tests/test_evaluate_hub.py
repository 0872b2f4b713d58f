"""Tasks on datasets of the hub, read from mirrors in the hub's layout that the tests write."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Outcome
from hydra.utils import instantiate
from transformers import AutoModelForCausalLM

from moe_lab.evaluate.run_tasks import run_tasks
from moe_lab.evaluate.suite import Suite
from moe_lab.evaluate.tasks import harness
from moe_lab.types import UserError

LABELS = ("very negative", "negative", "neutral", "positive", "very positive")
HEAD = "The sentiment of a review is very negative, negative, neutral, positive or very positive."
Job = Callable[..., Outcome]
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


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def sst5(tmp_path: Path) -> Path:
    """A mirror with SST-5 alone."""
    write_sst5(tmp_path / "mirror", reviews("test", 9))
    return tmp_path / "mirror"


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


@pytest.mark.slow
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


# --------------------------------------------------------------------------- calibration


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


# --------------------------------------------------------------------------- refusals


def test_refusals_come_before_any_work(job: Job, sst5: Path, tmp_path: Path) -> None:
    seer = ["eval=seer", "eval.tasks=[sst5]"]
    nothing = job(*seer, f"eval.mirror={tmp_path / 'none'}")
    assert nothing.code == 2 and "is no folder" in nothing.text and "eval.mirror" in nothing.text
    empty = tmp_path / "empty"
    empty.mkdir()
    missing = job(*seer, f"eval.mirror={empty}")
    assert missing.code == 2 and "has no SetFit/sst5" in missing.text
    hub = job(*seer)
    assert hub.code == 2
    assert "SetFit/sst5" in hub.text and "eval.mirror=<folder>" in hub.text
    (sst5 / "SetFit" / "sst5" / "test.jsonl").unlink()
    (sst5 / "SetFit" / "sst5" / "train.jsonl").unlink()
    (sst5 / "SetFit" / "sst5" / "dev.jsonl").unlink()
    no_files = job(*seer, f"eval.mirror={sst5}")
    assert no_files.code == 2 and "could not be loaded" in no_files.text
    for outcome in (nothing, missing, hub, no_files):
        assert "Traceback" not in outcome.text and not outcome.stages()


def test_a_broken_file_is_refused(sst5: Path) -> None:
    (sst5 / "SetFit" / "sst5" / "test.jsonl").write_text("no JSON\n")
    with harness.data_from(["sst5"], str(sst5)), pytest.raises(UserError, match="of the task sst5"):
        harness.load_tasks(["sst5"])


def test_names(sst5: Path) -> None:
    suite(sst5, tasks=["sst5", "sst5_generate"]).check()
    with pytest.raises(UserError, match=r"\['sst6'\].*sst5, sst5_generate"):
        replace(suite(sst5), tasks=["sst5", "sst6"]).check()
