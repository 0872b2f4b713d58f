"""A small recipe of SEER-MoE, at work on a tiny model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from moe_lab.compute import Compute
from moe_lab.data.tokens import Tokens
from moe_lab.finetune import training as finetune_training
from moe_lab.finetune.recipe import Phase
from moe_lab.finetune.seer import Seer
from moe_lab.models.edits.plan import Plan

NOTHING = Plan(())


def recipe_of(**options: Any) -> Seer:
    return Seer(phases={"lm": Phase(None, batch_size=4, learning_rate=1e-2)}, **options)


def rows(number: int, seed: int = 0) -> Tokens:
    """Samples of 3 to 11 random tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 12, (number,), generator=generator).tolist()
    samples = [torch.randint(3, 96, (n,), generator=generator).tolist() for n in lengths]
    return Tokens(tuple(map(tuple, samples)), pad_id=0)


def training(model: PreTrainedModel, recipe: Seer, folder: Path, number: int = 24) -> Any:
    tokens = {"lm/data": rows(number), "lm/validation": rows(6, seed=1)}
    phase = dataclasses.replace(recipe.phases["lm"], validation="given")
    recipe = dataclasses.replace(recipe, phases={"lm": phase})
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune_training.Training, "_write_trainable", lambda self: None)
        made = finetune_training.Training(
            model, NOTHING, recipe, tokens, 0, Compute("cpu", batch_size=3), folder
        )
    made._write_trainable = lambda: None
    return made
