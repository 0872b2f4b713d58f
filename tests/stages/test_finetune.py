"""The stage of fine-tuning: what it is remembered by, what it leaves."""

from __future__ import annotations

from pathlib import Path

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
