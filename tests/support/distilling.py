"""Teachers on disk, and small trainings with them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from families import tiny_batch

from moe_lab import processes
from moe_lab.compute import Compute
from moe_lab.data.embedded import StandardLibrary
from moe_lab.data.tokens import Tokens
from moe_lab.finetune import teacher
from moe_lab.finetune import training as finetune_training
from moe_lab.finetune.experts import Experts
from moe_lab.finetune.recipe import Phase
from moe_lab.finetune.router_kd import RouterKD
from moe_lab.finetune.teacher import IDS, LOG_PROBABILITIES, Teacher
from moe_lab.models.checkpoint import Checkpoint, load
from moe_lab.models.edits.plan import Plan

KEPT = {1: (0, 1, 2, 5), 2: (3, 4, 6, 7), 3: (0, 2, 4, 6)}
COMPUTE = Compute("cpu", batch_size=4)


def samples(seed: int, count: int, prompts: bool = False) -> Tokens:
    """Samples of 4 to 10 tokens, the last one twice, with `prompts` 1 to 3 of which are given."""
    batch = tiny_batch(seed=seed, batch=count, padding=False)
    rows = [tuple(row[: 4 + i % 7].tolist()) for i, row in enumerate(batch["input_ids"])]
    rows[0] = rows[-1]
    given = tuple(1 + i % 3 for i in range(count)) if prompts else ()
    return Tokens(tuple(rows), pad_id=0, prompts=given)


TEXTS = {
    "lm/data": samples(1, 24),
    "lm/validation": samples(2, 6),
    "sft/data": samples(3, 10, prompts=True),
}


def teach(home: Path, name: str, top_k: int | None, temperature: float, **compute: object) -> None:
    (home / name).mkdir()
    dense = Checkpoint(home / "dense", "float32")
    how = dataclasses.replace(COMPUTE, **compute)
    teacher.write_teacher(dense, list(TEXTS.values()), top_k, temperature, how, home / name)


def reading(home: Path, name: str) -> Teacher:
    return Teacher(home / name, TEXTS.values())


def slow_rows(model: torch.nn.Module, tokens: Tokens, temperature: float = 1.0) -> torch.Tensor:
    """log softmax(logits / T) of all targets, one sample at a time and in float64."""
    rows = []
    prompts = tokens.prompts or (1,) * len(tokens.samples)
    with torch.no_grad():
        for ids, prompt in zip(tokens.samples, prompts, strict=True):
            logits = model(torch.tensor([ids])).logits[0].double()
            rows += [logits[at - 1] / temperature for at in range(prompt, len(ids))]
    return torch.stack(rows).log_softmax(-1)


def taught(logits: torch.Tensor, top_k: int | None, temperature: float) -> dict[str, torch.Tensor]:
    ids = None if top_k is None else logits.topk(top_k).indices
    found = {LOG_PROBABILITIES: teacher.coarsened(logits, ids, temperature)}
    return found if ids is None else found | {IDS: ids.int()}


def recipe_of(kind: type = Experts, supervised: bool = True, **changes: object):
    """A small recipe; changes: of the recipe, and of the phase `lm`."""
    names = {field.name for field in dataclasses.fields(kind)}
    ours = {key: value for key, value in changes.items() if key in names}
    rest = {key: value for key, value in changes.items() if key not in names}
    text = dict(data=StandardLibrary(24, 10), validation=StandardLibrary(6, 10, split="validation"))
    phases = {"lm": Phase(**(text | dict(batch_size=4, learning_rate=1e-2) | rest))}
    if supervised:
        phases["sft"] = Phase(
            data=StandardLibrary(10, 10), batch_size=2, gradient_accumulation=2, learning_rate=5e-3
        )
    return kind(phases=phases, **(dict(validate_every=3, teacher_top_k=8) | ours))


def training(
    home: Path, folder: Path, known: str | None, **changes: object
) -> finetune_training.Training:
    """A training of the pruned model that begins when it is run."""
    plan = Plan.load(home / "plan.json")
    model = load(home / "pruned", dtype="float32")
    known_by = reading(home, known) if known else None
    recipe = recipe_of(**changes)
    return finetune_training.Training(model, plan, recipe, TEXTS, 0, COMPUTE, folder, known_by)


def curve(folder: Path) -> list[dict]:
    return [json.loads(row) for row in (folder / "curve.jsonl").read_text().splitlines()]


def train_one(home: Path, folder: Path) -> None:
    """Distil through both phases; what the routers became."""
    done = training(home, folder, "few", kind=RouterKD)
    done.run()
    if processes.is_main():
        torch.save({name: p.detach() for name, p in done.trainable.items()}, folder / "routers.pt")


FEW = [
    "metric=reap", "ratio.ratio=0.5", "finetune=router_kd", "finetune.teacher_top_k=16",
    "finetune.phases.lm.data.num_samples=16", "finetune.phases.lm.data.max_length=24",
    "finetune.phases.lm.validation.num_samples=4", "finetune.phases.lm.validation.max_length=24",
    "finetune.phases.lm.batch_size=4",
]  # fmt: skip
