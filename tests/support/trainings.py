"""Compressed checkpoints, and small trainings of their experts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from families import tiny_batch, tiny_model

from moe_lab import processes
from moe_lab.compute import Compute
from moe_lab.data.embedded import StandardLibrary, StandardQuestions
from moe_lab.data.tokens import Tokens
from moe_lab.finetune import training as finetune_training
from moe_lab.finetune.experts import Experts
from moe_lab.finetune.recipe import Phase
from moe_lab.models.checkpoint import load
from moe_lab.models.edits.plan import Plan, apply_plan, read_edit
from moe_lab.models.layers import moe_layers
from moe_lab.models.saving import save_checkpoint

PLANS = {
    "condense": [
        dict(
            index=1, edit="condense", experts=(5, 2), gates=(0.4, 0.3), widths=(24, 16, 16),
            shared_gate=0.5,
        ),
        dict(
            index=3, edit="condense", experts=(0,), gates=(0.2,), widths=(24, 16), shared_gate=0.5
        ),
    ],
    "prune": [dict(index=2, edit="prune", kept=(0, 1, 2, 5))],
    "merge": [
        dict(
            index=2, edit="merge", kept=(0, 3, 6), groups=((0, 1, 2), (3, 4, 5), (6, 7)),
            weights=((0.5, 0.25, 0.25), (1.0, 0.0, 0.0), (0.5, 0.5)),
        )
    ],
}  # fmt: skip
RECIPE = {field.name for field in dataclasses.fields(Experts)}


def samples(seed: int, count: int, prompts: bool = False) -> Tokens:
    """Samples of 4 to 10 tokens, with `prompts` 1 to 3 of which are given."""
    batch = tiny_batch(seed=seed, batch=count, padding=False)
    rows = [tuple(row[: 4 + i % 7].tolist()) for i, row in enumerate(batch["input_ids"])]
    given = tuple(1 + i % 3 for i in range(count)) if prompts else ()
    return Tokens(tuple(rows), pad_id=0, prompts=given)


def recipe_of(supervised: bool = False, **changes: object) -> Experts:
    """A small recipe; changes: of the recipe, and of the phase `lm`."""
    ours = {key: value for key, value in changes.items() if key in RECIPE}
    rest = {key: value for key, value in changes.items() if key not in RECIPE}
    text = dict(data=StandardLibrary(24, 10), validation=StandardLibrary(6, 10, split="validation"))
    phases = {"lm": Phase(**(text | dict(batch_size=4, learning_rate=1e-2) | rest))}
    if supervised:
        phases["sft"] = Phase(
            data=StandardQuestions(10, 10), batch_size=2, gradient_accumulation=2, epochs=2,
            learning_rate=5e-3, schedule="cosine", weight_decay=0.1,
        )  # fmt: skip
    return Experts(phases=phases, **(dict(validate_every=3) | ours))


def training(model, plan: Plan, folder: Path, **changes: object) -> finetune_training.Training:
    recipe = recipe_of(**changes)
    tokens = {"lm/data": samples(1, 24), "lm/validation": samples(2, 6)}
    tokens["sft/data"] = samples(3, 10, prompts=True)
    return finetune_training.Training(
        model, plan, recipe, tokens, seed=0, compute=Compute("cpu"), folder=folder
    )


def compressed(kind: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Plan:
    """A compressed checkpoint in folder/compressed, in bfloat16 as real ones are."""
    model = tiny_model("qwen2_moe").to(dtype)
    model.save_pretrained(folder / "source")
    names = {layer.info.index: layer.info.name for layer in moe_layers(model)}
    edits = (read_edit({"name": names[edit["index"]]} | edit) for edit in PLANS[kind])
    plan = Plan(tuple(edits))
    model = load(folder / "source", dtype="float32")
    apply_plan(model, plan)
    save_checkpoint(model, folder / "compressed", folder / "source", padding=1.0)
    return plan


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(row) for row in (folder / "curve.jsonl").read_text().splitlines()]


def steps_of(folder: Path) -> list[dict]:
    return [row for row in rows_of(folder) if "loss" in row]


def train_one(folder: Path) -> torch.Tensor:
    """Train through both phases what lies in the folder's parent; what a layer became."""
    edits = json.loads((folder.parent / "edits.json").read_text())
    plan = Plan(tuple(read_edit(values) for values in edits))
    model = load(folder.parent / "compressed", dtype="float32")
    done = training(model, plan, folder, supervised=True)
    done.run()
    if processes.is_main():
        torch.save(model.model.layers[1].mlp.down_proj.weight, folder / "weight.pt")
