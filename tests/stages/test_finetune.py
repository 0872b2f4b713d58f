"""The stage of fine-tuning: what it is remembered by, what it leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
from running import Job
from safetensors.torch import load_file
from trainings import compressed, recipe_of, samples

from moe_lab.compute import Compute
from moe_lab.data.tokens import Tokens
from moe_lab.models.checkpoint import Checkpoint, load
from moe_lab.stages.context import Context
from moe_lab.stages.finetune import FineTuning, finetune, told_of_training
from moe_lab.store import Artifact, Store


def test_the_stage_is_remembered_by_text_not_by_path(tmp_path: Path) -> None:
    plan = compressed("condense", tmp_path)
    planned = tmp_path / "planned"
    planned.mkdir()
    (planned / "plan.json").write_text(plan.to_text())
    context, recipe = Context(Store(tmp_path / "store"), Compute("cpu")), recipe_of(gates=True)
    tokens = {"lm/data": samples(1, 8), "lm/validation": samples(2, 4)}

    def run(path: str, **changes: Tokens) -> Artifact:
        options = {"gates": True, "phases": {"lm": {"data": {"files": [path]}}, "sft": None}}
        artifact = Artifact("plan", "key", planned, True, 0.0)
        dense = Checkpoint(tmp_path / "compressed", "float32")
        given = tokens | {name.replace("_", "/", 1): part for name, part in changes.items()}
        return finetune(context, FineTuning(dense, artifact, recipe, options, given, seed=0))

    first = run("here.jsonl")
    assert not first.cached
    files = {path.name for path in first.folder.iterdir()}
    assert files == {"checkpoint", "form.json", "curve.jsonl", "trainable.json", "artifact.json"}
    tuned = load_file(first.folder / "checkpoint" / "model.safetensors")
    assert tuned.keys() == load_file(tmp_path / "compressed" / "model.safetensors").keys()
    assert run("there.jsonl").key == first.key
    assert run("here.jsonl", lm_data=samples(7, 8)).key != first.key
    told = told_of_training(first.folder, Checkpoint(tmp_path / "source"))
    dense = load(tmp_path / "source").num_parameters()
    number = 2 * 3 * 32 * 56 + 5
    assert told["finetuned/trainable_parameters"] == number
    assert told["finetuned/trainable_share"] == number / dense
    assert told["finetune/lm/data"] == "the standard library's train split"


def test_where_nothing_is_left_to_tune_it_is_said_or_refused(job: Job) -> None:
    """Without a compression it is the default recipe that has nothing to do; else it was asked."""
    done = job("method=none", "finetune=experts")
    assert done.code == 0
    assert "nothing is tuned: finetune=experts trains what is left" in done.text
    assert "finetune" not in done.stages()
    refused = job("method=merge", "ratio.ratio=0", "finetune=experts")
    assert refused.code == 2
    assert "it changes nothing" in refused.report["error"]
    assert refused.stages() == ["plan", "profile"]


FEW = [
    "finetune.phases.lm.data.num_samples=16",
    "finetune.phases.lm.validation=null",
    "+finetune.phases.lm.num_steps=2",
]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["finetune=expert_dropping"], "asked for finetune.windows=8, given 1: the training has 2"),
        (["finetune=seer"], "finetune.top_k=1: of 2 steps none is trained with as many experts"),
        (["finetune=expert_dropping", "finetune.beta=0.001", "finetune.force=null"],
         "dropped no expert: each got at least finetune.beta=0.001"),
        (["finetune=seer", "finetune.annealing=at_once"], None),
    ],
)  # fmt: skip
def test_what_so_few_steps_cannot_do_is_said(
    job: Job, options: list[str], words: str | None
) -> None:
    done = job(*options, *FEW)
    assert done.code == 0, done.text
    if words:
        assert words in done.text
    else:
        assert "WARNING" not in done.text
