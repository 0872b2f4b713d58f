"""A small training that drops experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from families import tiny_batch, tiny_model
from transformers import PreTrainedModel

from moe_lab.compute import Compute
from moe_lab.data.embedded import StandardLibrary
from moe_lab.data.tokens import Tokens
from moe_lab.finetune import training as finetune_training
from moe_lab.finetune.expert_dropping import ExpertDropping
from moe_lab.finetune.recipe import Phase
from moe_lab.models.edits.plan import Plan

NOTHING = Plan(())


def recipe_of(**options: Any) -> ExpertDropping:
    text = dict(data=StandardLibrary(24, 10), validation=StandardLibrary(6, 10, split="validation"))
    phase = Phase(**text, batch_size=4, learning_rate=1e-2)
    return ExpertDropping(phases={"lm": phase}, **(dict(windows=2, validate_every=4) | options))


def rows(count: int, seed: int = 0) -> Tokens:
    """Samples of 4 to 10 random tokens."""
    ids = tiny_batch(seed=seed, batch=count, padding=False)["input_ids"].tolist()
    return Tokens(tuple(tuple(row[: 4 + i % 7]) for i, row in enumerate(ids)), pad_id=0)


def training(model: PreTrainedModel, folder: Path, steps: int = 8, **options: Any) -> Any:
    """A training of `steps` steps of four samples, on random tokens."""
    folder.mkdir(exist_ok=True)
    tokens = {"lm/data": rows(4 * steps), "lm/validation": rows(6, seed=1)}
    compute = Compute("cpu", batch_size=3)
    return finetune_training.Training(
        model, NOTHING, recipe_of(**options), tokens, 0, compute, folder
    )


def train_one(folder: Path) -> None:
    """Train with what is dropped by the threshold; the curve is the result."""
    training(tiny_model("mixtral"), folder, force=None, beta=0.9).run()
